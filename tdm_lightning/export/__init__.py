"""Reduced models as files that run without this library, each checked before it is kept."""

from tdm_lightning.export.files import (
    BATCH_SIZES,
    Exported,
    check_static,
    export_compiled,
    export_onnx,
    export_program,
    write_onnx,
)

__all__ = [
    "BATCH_SIZES",
    "Exported",
    "check_static",
    "export_compiled",
    "export_onnx",
    "export_program",
    "write_onnx",
]
