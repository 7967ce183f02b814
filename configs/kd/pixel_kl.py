# Pixel-wise distillation of segmentation (arXiv 1903.04197): KL between the class distributions of every pixel.
terms = dict(
    logits=dict(
        loss=dict(type='PixelwiseKLDivLoss', temperature=1.0), student='decode_head', teacher='decode_head', weight=1.0
    )
)
