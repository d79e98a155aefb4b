"""A Trainer for tests."""

#: Arguments of one that runs on the CPU, says nothing and logs nowhere.
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
