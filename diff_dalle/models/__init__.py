"""Networks: text encoder, U-Net, generator of one stage, noised CLIP."""
