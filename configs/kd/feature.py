# FitNets hints (arXiv 1412.6550) on every level of the neck, through trainable 1x1 adapters where widths differ.
terms = dict(neck=dict(loss=dict(type='FeatureMSELoss'), student='neck', teacher='neck'))
