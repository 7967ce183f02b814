# Across architectures in the space of the logits (OFA-KD, arXiv 2310.19444): the student's deep stages make logits of
# their own through trained projectors, because features of a ViT and of a CNN have little in common.
branch = dict(loss=dict(type='OFALoss'), teacher='logits', adapter=dict(type='LogitProjector'))
terms = dict(
    # The label's own cross-entropy is the student's already.
    logits=dict(loss=dict(type='OFALoss', form='author'), student='logits', teacher='logits'),
    last=dict(student='stages[-1]', **branch),
    before=dict(student='stages[-2]', **branch),
)
del branch
