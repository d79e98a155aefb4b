"""Lightning callbacks that work in any Trainer with any module that holds a timm ViT."""
