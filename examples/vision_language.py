"""LLaVA whose projector takes merged tokens, and whose language model heeds their sizes."""

import copy

import torch
from sklearn.datasets import load_sample_image
from transformers import LlavaConfig, LlavaForConditionalGeneration

import tdm_lightning as tdm
from tdm_lightning.compare import speedup

torch.manual_seed(0), torch.set_grad_enabled(False)
shape = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
tower = {"image_size": 336, "patch_size": 14, "num_hidden_layers": 12, **shape}
text = {"vocab_size": 100, "num_hidden_layers": 4, **shape}
config = LlavaConfig(vision_config=tower, text_config=text, image_token_id=99)
plain = LlavaForConditionalGeneration(config).eval()  # or .from_pretrained("llava-hf/…")
photo = torch.tensor(load_sample_image("china.jpg")[None, :336, :336]).movedim(3, 1) / 127.5 - 1
words = torch.tensor([[1, *[plain.config.image_token_id] * 576, 5, 6]])  # or both of a processor
llava = tdm.attach(copy.deepcopy(plain), tdm.WardTDM(0.7))  # its tower, which shows all patches


def merged(photo):
    tokens, size = tdm.find_vit(llava).forward_merged(photo, llava.config.vision_feature_layer)
    x, seen = llava.get_input_embeddings()(words), llava.model.multi_modal_projector(tokens)
    x = torch.cat((x[:, :1], seen, x[:, 577:]), dim=1)
    bias = torch.nn.functional.pad(size.log(), (1, words.shape[1] - 577))[:, None, None]
    mask = (bias + torch.full(2 * x.shape[1:2], -1e9).triu(1)).to(x.dtype)
    return llava(inputs_embeds=x, attention_mask=mask).logits[:, -1]


before, *ways = [lambda x, m=m: m(words, x).logits[:, -1] for m in (plain, llava)] + [merged]
for way in ways:
    alike = torch.cosine_similarity(before(photo), way(photo)).item()
    print(f"{speedup(before, way, photo, rounds=3):.2f} times as fast, logits' cosine {alike:.4f}")
print("of 576 patches:", tdm.find_vit(llava).trace(photo)[1].token_counts)
print("all patches:", llava.generate(words, pixel_values=photo, max_new_tokens=4)[0, -4:].tolist())
for _ in range(4):
    words = torch.cat((words, merged(photo).argmax(1, keepdim=True)), dim=1)
print("merged ones:", words[0, -4:].tolist())
