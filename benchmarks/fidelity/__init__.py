"""How far methods move what a pretrained ViT makes of photographs."""
