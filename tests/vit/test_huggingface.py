"""Image encoders of transformers: their layers are reduced in their place."""

import copy
import io

import pytest
import torch
from PIL import Image
from torch import nn

import tdm_lightning as tdm
from tdm_lightning.errors import ReductionError, UnsupportedModelError
from tdm_lightning.vit.find import find_vit

transformers = pytest.importorskip("transformers", minversion="5.20")
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 4,
}


def encoder(name):
    """An encoder alone."""
    config = getattr(transformers, name + "Config")
    kind = name.removesuffix("Config")
    return getattr(transformers, kind + "Model")(config(**SHAPE))


def siglip():
    text = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.SiglipConfig(
        vision_config=SHAPE, text_config={**text, "num_hidden_layers": 2, "eos_token_id": 1}
    )


def clip():
    text = {"vocab_size": 60, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    text |= {"num_hidden_layers": 2, "bos_token_id": 58, "eos_token_id": 59}
    return transformers.CLIPConfig(vision_config=SHAPE, text_config=text, projection_dim=16)


def beit(**settings):
    return transformers.BeitConfig(**{**SHAPE, "use_relative_position_bias": True, **settings})


def data2vec(**settings):
    return transformers.Data2VecVisionConfig(**SHAPE, **settings)


#: Encoders, and models around them.
MODELS = {
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SHAPE)),
    "deit": lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SHAPE)),
    "msn": lambda: encoder("ViTMSN"),
    "ijepa": lambda: encoder("IJepa"),
    "dinov2": lambda: transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**SHAPE, layerscale_value=0.5)
    ),
    "dinov2-registers": lambda: encoder("Dinov2WithRegisters"),
    "dinov3": lambda: transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(**SHAPE, num_register_tokens=2)
    ),
    "clip": lambda: encoder("CLIPVision"),
    "clip-projected": lambda: transformers.CLIPVisionModelWithProjection(clip().vision_config),
    "siglip": lambda: encoder("SiglipVision"),
    "siglip-classifier": lambda: transformers.SiglipForImageClassification(siglip()),
    "beit": lambda: transformers.BeitForImageClassification(beit()),
    "beit-class": lambda: transformers.BeitModel(beit(use_mean_pooling=False)),
    "beit-shared": lambda: transformers.BeitModel(
        beit(use_relative_position_bias=False, use_shared_relative_position_bias=True)
    ),
    "beit-absolute": lambda: transformers.BeitModel(
        beit(use_relative_position_bias=False, use_absolute_position_embeddings=True)
    ),
    "data2vec": lambda: transformers.Data2VecVisionForImageClassification(
        data2vec(use_shared_relative_position_bias=True)
    ),
    "data2vec-each": lambda: transformers.Data2VecVisionModel(
        data2vec(use_relative_position_bias=True, layer_scale_init_value=0.0)
    ),
}
ATTACHED = {"token_reduction", "_token_reduced"}


def make(name="vit"):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.2)
    return model


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_every_model(name, images):
    model = make(name)
    plain, weights = model(pixel_values=images), copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    assert tdm.attach(model, tdm.TDM(1.0, (1,))) is model
    torch.testing.assert_close(model(pixel_values=images)[0], plain[0], atol=1e-5, rtol=1e-5)
    tdm.detach(model)

    tdm.attach(model, tdm.WardTDM(0.5, (1, 2)))
    assert model.state_dict().keys() == weights.keys()
    found = model(pixel_values=images)
    assert [None if v is None else v.shape for v in found.values()] == [
        None if v is None else v.shape for v in plain.values()
    ]
    assert not torch.allclose(found[0], plain[0], atol=1e-4)
    for other in (copy.deepcopy(model), _stored(model)):
        assert torch.equal(other(pixel_values=images)[0], found[0])
    assert find_vit(model).trace(images)[1].token_counts == [64, 32, 16, 16]
    macs = tdm.flops.mac_report(find_vit(model)).total

    assert tdm.detach(model) is model
    assert macs < 0.75 * tdm.flops.count_macs(find_vit(model))
    assert [type(module) for module in model.modules()] == kinds
    assert not any(ATTACHED & vars(module).keys() for module in model.modules())
    assert torch.equal(model(pixel_values=images)[0], plain[0])


def _stored(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_hidden_states_are_of_all_patches(attention, images):
    model = make("dinov2")
    model.set_attn_implementation(attention)
    tdm.attach(model, tdm.WardTDM(0.5, (1, 2)))
    expected = model(pixel_values=images).logits
    found = model(pixel_values=images, output_hidden_states=True)
    assert [tuple(state.shape) for state in found.hidden_states] == [(2, 65, 32)] * 5
    assert torch.equal(found.logits, expected)
    assert len(found.hidden_states[2][0, 1:].unique(dim=0)) == 32
    with pytest.raises(ReductionError, match="attention maps are of merged tokens"):
        model(pixel_values=images, output_attentions=True)


@pytest.mark.parametrize("name", ["clip", "siglip"])
@torch.no_grad()
def test_merged_tokens_are_those_of_the_hidden_states(name, images):
    model = tdm.attach(make(name), tdm.WardTDM(0.5, (1, 2)))
    shown = model(pixel_values=images, output_hidden_states=True).hidden_states[-2]
    patches, size = find_vit(model).forward_merged(images, -2)
    assert patches.shape == (2, 16, 32)
    assert size.sum(dim=1).tolist() == [64, 64]
    first = shown.shape[1] - 64
    for image in range(2):
        alike = (patches[image].unsqueeze(1) - shown[image, first:]).abs().amax(dim=2) < 1e-4
        assert alike.sum(dim=1).tolist() == size[image].tolist()


@torch.no_grad()
def test_backbones_give_maps_of_all_patches(images):
    config = transformers.Dinov2Config(**SHAPE, out_features=["stage2", "stage4"])
    model = transformers.Dinov2Backbone(config).eval()
    tdm.attach(model, tdm.TDM(0.5, (1, 2)))
    maps = model(images).feature_maps
    assert [tuple(one.shape) for one in maps] == [(2, 32, 8, 8)] * 2


@torch.no_grad()
@pytest.mark.parametrize("shared", [True, False])
def test_hidden_states_that_the_encoder_collects(shared, images):
    model = transformers.Data2VecVisionModel(data2vec(use_shared_relative_position_bias=shared))
    tdm.attach(model.eval(), tdm.WardTDM(0.5, (1, 2)))
    found = model(pixel_values=images, output_hidden_states=True)
    assert [tuple(state.shape) for state in found.hidden_states] == [(2, 65, 32)] * 5
    assert [len(state[0, 1:].unique(dim=0)) for state in found.hidden_states] == [
        64,
        64,
        32,
        16,
        16,
    ]
    with pytest.raises(ReductionError, match="attention maps are of merged tokens"):
        model(pixel_values=images, output_attentions=True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_patches_without_padding(attention, images):
    config = transformers.Siglip2VisionConfig(**SHAPE, num_patches=64)
    model = transformers.Siglip2VisionModel(config).eval()
    model.set_attn_implementation(attention)
    patches = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 64, 48)
    mask = torch.ones(2, 64, dtype=torch.int64)
    given = {"pixel_values": patches, "spatial_shapes": torch.tensor([[8, 8]] * 2)}
    plain = model(**given, pixel_attention_mask=mask)
    tdm.attach(model, tdm.TDM(1.0, (1,)))
    found = model(**given, pixel_attention_mask=mask)
    torch.testing.assert_close(found.pooler_output, plain.pooler_output, atol=1e-5, rtol=1e-5)
    apart = find_vit(model).forward_features(images)
    torch.testing.assert_close(apart, plain.last_hidden_state, atol=1e-5, rtol=1e-5)
    tdm.attach(tdm.detach(model), tdm.WardTDM(0.5, (1, 2)))
    found = model(**given, pixel_attention_mask=mask)
    assert [len(image.unique(dim=0)) for image in found.last_hidden_state] == [16, 16]
    mask[0, 60:] = 0
    with pytest.raises(ReductionError, match="attention mask names patches"):
        model(**given, pixel_attention_mask=mask)


@torch.no_grad()
def test_a_masked_autoencoder_sees_what_is_not_masked(images):
    decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
    decoder |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32}
    config = transformers.ViTMAEConfig(**SHAPE, **decoder, mask_ratio=0.5)
    model, noise = transformers.ViTMAEForPreTraining(config).eval(), torch.rand(2, 64)
    before = model(pixel_values=images, noise=noise)
    tdm.attach(model, tdm.TDM(1.0, (1,)))
    same = model(pixel_values=images, noise=noise)
    torch.testing.assert_close(same.logits, before.logits, atol=1e-5, rtol=1e-5)
    tdm.attach(tdm.detach(model), tdm.ToMe(8))
    after = model(pixel_values=images, noise=noise)
    assert after.logits.shape == before.logits.shape
    assert not torch.allclose(after.logits, before.logits, atol=1e-4)
    assert model.vit(pixel_values=images, noise=noise).last_hidden_state.shape == (2, 33, 32)


@torch.no_grad()
def test_whole_models_of_images_and_words(images):
    words = torch.randint(2, 50, (3, 6))
    for model in (transformers.CLIPModel(clip()), transformers.SiglipModel(siglip())):
        before = model.eval()(input_ids=words, pixel_values=images)
        tdm.attach(model, tdm.WardTDM(0.5, (1,)))
        after = model(input_ids=words, pixel_values=images)
        assert torch.equal(before.text_embeds, after.text_embeds)
        assert before.image_embeds.shape == after.image_embeds.shape
        assert not torch.equal(before.image_embeds, after.image_embeds)


@torch.no_grad()
def test_a_language_model_that_sees_writes_on(images):
    text = transformers.LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=clip().vision_config, text_config=text, image_token_id=59
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    tdm.attach(model, tdm.WardTDM(0.5, (1, 2)))
    words = torch.cat((torch.ones(1, 1), torch.full((1, 64), 59), torch.ones(1, 2)), dim=1).long()
    found = model.generate(
        input_ids=words, pixel_values=images[:1], max_new_tokens=3, min_new_tokens=3,
        do_sample=False, attention_mask=torch.ones_like(words),
    )  # fmt: skip
    assert found.shape == (1, 70)


@torch.no_grad()
def test_pipeline_and_plain_weights(tmp_path):
    model = tdm.attach(make(), tdm.TDM(0.5, (1, 2)))
    size = {"height": 32, "width": 32}
    processor = transformers.ViTImageProcessor(size=size)
    classify = transformers.pipeline(
        "image-classification", model=model, image_processor=processor, device="cpu"
    )
    assert len(classify(Image.new("RGB", (40, 40), "red"))) == 2
    model.save_pretrained(tmp_path)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert type(plain.vit.layers[0]).forward is not type(model.vit.layers[0]).forward


def test_training_with_and_without_checkpoints(images):
    found = []
    for checkpointing in (False, True):
        model = tdm.attach(make().train(), tdm.TDM(0.5, (1, 2)))
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = model(pixel_values=images, labels=torch.tensor([0, 1])).loss
        loss.backward()
        found.append(model.vit.layers[0].attention.q_proj.weight.grad)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found)


def test_trainer(images, tmp_path):
    rows = [{"pixel_values": image, "labels": 1} for image in images]
    settings = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = tdm.attach(make(), tdm.WardTDM(0.5, (1, 2)))
    before = model.classifier.weight.clone()
    transformers.Trainer(model, settings, train_dataset=rows).train()
    assert not torch.equal(model.classifier.weight, before)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_it_compiles_exports_and_runs_in_half_precision(name, images):
    model = make(name)
    tdm.attach(model, tdm.WardTDM(0.6, (1, 2)))
    expected = model(pixel_values=images)[0]
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(pixel_values=images)[0], expected, atol=1e-5, rtol=1e-5)
    program = torch.export.export(model, (), {"pixel_values": images}, strict=False)
    exported = program.module()(pixel_values=images)[0]
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)
    half = model.bfloat16()(pixel_values=images.bfloat16())[0]
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_pass_leaves_no_state_and_images_are_alone(name, images):
    model, others = make(name), torch.randn(3, 3, 32, 32)
    tdm.attach(model, tdm.WardTDM(0.6, (1, 2)))
    first = model(pixel_values=images)[0]
    model(pixel_values=others)
    assert torch.equal(model(pixel_values=images)[0], first)
    alone = torch.cat([model(pixel_values=image.unsqueeze(0))[0] for image in images])
    torch.testing.assert_close(alone, first, atol=1e-5, rtol=1e-5)


class LowRank(nn.Module):
    """A projection with an adapter beside it, as LoRA puts in its place."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))

    def merged(self):
        self.base_layer.weight += self.up.weight @ self.down.weight
        return self.base_layer


@pytest.mark.parametrize("first", ["attach", "adapt"])
@torch.no_grad()
def test_low_rank_adapters_on_queries_and_values(first, images):
    model = make()
    if first == "attach":
        tdm.attach(model, tdm.TDM(0.5, (1, 2)))
    before = copy.deepcopy(model)(pixel_values=images).logits
    for layer in model.vit.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.attention, name, LowRank(getattr(layer.attention, name)))
    if first == "adapt":
        tdm.attach(model, tdm.TDM(0.5, (1, 2)))
    found = model(pixel_values=images).logits
    assert not torch.allclose(found, before, atol=1e-3)
    for layer in model.vit.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.attention, name, getattr(layer.attention, name).merged())
    torch.testing.assert_close(model(pixel_values=images).logits, found, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_quantised_linear_layers(images):
    model = tdm.attach(make(), tdm.TDM(0.5, (1, 2)))
    expected = model(pixel_values=images).logits
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    found = small(pixel_values=images).logits
    assert type(small.vit.layers[0].attention.q_proj) is not nn.Linear
    assert found.shape == expected.shape
    assert torch.cosine_similarity(found, expected).min() > 0.5


def exported(model):
    """A program for batches of any size."""
    batch = {"pixel_values": {0: torch.export.Dim("batch")}}
    images = {"pixel_values": torch.zeros(2, 3, 32, 32)}
    return torch.export.export(model, (), images, dynamic_shapes=batch).module()


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "clip", "siglip", "beit", "data2vec"])
@torch.no_grad()
def test_exported_batches_of_any_size(name):
    model, images = make(name), torch.randn(3, 3, 32, 32)
    tdm.attach(model, tdm.WardTDM(0.6, (1, 2)))
    run = exported(model)
    for size in (1, 2, 3):
        found, wanted = (one(pixel_values=images[:size])[0] for one in (run, model))
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_encoder_is_exported_to_a_file(images, tmp_path):
    model = make("vit")
    tdm.attach(model, tdm.TDM(0.6, (1, 2)))
    with pytest.raises(ValueError, match=r"export its encoder, tdm.find_vit\(model\)"):
        tdm.export.export_program(model, tmp_path / "m.pt2")
    encoder = tdm.find_vit(model)
    tdm.export.export_program(encoder, tmp_path / "m.pt2")
    found = torch.export.load(tmp_path / "m.pt2").module()(images)
    torch.testing.assert_close(found, encoder(images), atol=1e-5, rtol=1e-5)
    hidden = model.vit(pixel_values=images).last_hidden_state
    torch.testing.assert_close(found, hidden[:, 0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_other_sizes_and_masked_patches():
    model = tdm.attach(make(), tdm.TDM(0.5, (1, 2)))
    images = torch.randn(1, 3, 48, 48)
    found = model.vit(pixel_values=images, interpolate_pos_encoding=True)
    assert found.last_hidden_state.shape == (1, 145, 32)
    with pytest.raises(ValueError, match="doesn't match model"):
        model(pixel_values=images)
    config = transformers.ViTConfig(**SHAPE, encoder_stride=4)
    painter = tdm.attach(transformers.ViTForMaskedImageModeling(config).eval(), tdm.TDM(0.5, (1,)))
    masked = torch.arange(64).unsqueeze(0) % 2 == 0
    painted = painter(pixel_values=images[..., :32, :32], bool_masked_pos=masked)
    assert painted.reconstruction.shape == (1, 3, 32, 32)


@torch.no_grad()
def test_what_would_go_wrong_is_named(images):
    model = tdm.attach(make(), tdm.TDM(0.5, (1, 2)))
    with pytest.raises(ReductionError, match="attention mask names patches"):
        model(pixel_values=images, attention_mask=torch.arange(65).expand(2, -1) > 3)
    with pytest.raises(ValueError, match="reduced already"):
        tdm.attach(model, tdm.TDM(0.5, (1,)))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ReductionError, match="'flash_attention_2', which takes no bias"):
        find_vit(model).vit.layers[0](torch.zeros(1, 65, 32))
    with pytest.raises(UnsupportedModelError, match="'flash_attention_2', which takes no bias"):
        tdm.attach(tdm.detach(model), tdm.TDM(0.5, (1,)))
    for strategy in (tdm.DyViT(0.7, (1, 2)), tdm.AViT()):
        with pytest.raises(TypeError, match="runs by its library's code"):
            tdm.attach(make(), strategy)


class OtherAttention(nn.Module):
    pass


def test_unknown_layers_are_refused():
    model = make()
    model.vit.layers[2].attention = OtherAttention()
    with pytest.raises(UnsupportedModelError, match="its attention is OtherAttention"):
        tdm.attach(model, tdm.TDM(0.5, (1,)))
    old = make()
    del old.vit.layers[0].attention.q_proj
    with pytest.raises(UnsupportedModelError, match="version 5.20 or newer is needed"):
        tdm.attach(old, tdm.TDM(0.5, (1,)))
    del old.vit.layers
    with pytest.raises(UnsupportedModelError, match="version 5.20 or newer is needed"):
        tdm.attach(old, tdm.TDM(0.5, (1,)))
    with pytest.raises(UnsupportedModelError, match="cannot reduce the tokens of CLIPTextModel"):
        tdm.attach(transformers.CLIPTextModel(clip().text_config), tdm.TDM())


@torch.no_grad()
def test_someone_who_changes_shown_tokens_is_stopped(images):
    model = tdm.attach(make(), tdm.TDM(0.5, (1, 2)))
    model.vit.layers[2].register_forward_hook(lambda *given: given[2] + 1)
    with pytest.raises(ReductionError, match="changed between two layers"):
        model(pixel_values=images)
