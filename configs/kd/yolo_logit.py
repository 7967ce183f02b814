# Classic YOLO logit KD: L2 on objectness, box and class logits of the whole head.
terms = dict(logits=dict(loss=dict(type='YOLOLogitLoss'), student='bbox_head', teacher='bbox_head'))
