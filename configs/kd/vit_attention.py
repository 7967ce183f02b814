# A ViT with 12 blocks shows a CNN where to look: the attention of its class token in the last block against the CNN's
# own activations (attention transfer, arXiv 1612.03928). Other depths: name their last block.
terms = dict(
    logits=dict(loss=dict(type='KLDivLoss', temperature=4.0), student='logits', teacher='logits'),
    attention=dict(
        loss=dict(type='AttentionTransferLoss'),
        student='stages[-2]',
        teacher='net.blocks.11.attn.attn_drop',
        weight=100.0,
    ),
)
