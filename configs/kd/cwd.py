# Channel-wise distillation (arXiv 2011.13256): KL between where teacher and student see each class.
terms = dict(
    logits=dict(
        loss=dict(type='ChannelWiseDivLoss', temperature=4.0), student='decode_head', teacher='decode_head', weight=3.0
    )
)
