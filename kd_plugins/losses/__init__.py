"""What is matched between student and teacher: one published method per file, as a function and a module.

Every loss returns a scalar that is 0 when student and teacher agree (except ``HardLabelLoss`` and ``OFALoss``,
cross-entropies, ``MGDLoss``, which has to recover what it hides, and ``BalancedKLDivLoss``, which balances the teacher
first), computes in float32 outside autocast (float64
stays), sends no gradient to the teacher, and states its reduction. The class attribute ``consumes`` says what it is
given: ``'features'`` (two feature maps), ``'logits'`` (two ``(..., C)`` tensors), ``'predictions'`` (two aligned
``DensePredictions``), ``'masks'`` (two ``(B, K, H, W)`` maps of mask logits) or ``'segmentation'`` (two
``(B, C, H, W)`` maps of class logits, whose grids may differ); a loss with ``needs_target`` takes the labels as third
argument. Only torch is needed::

    from kd_plugins.losses import KLDivLoss, kl_div

    loss = kl_div(student_logits, teacher_logits, temperature=4.0)
    loss = KLDivLoss(temperature=4.0)(student_logits, teacher_logits)
"""

from kd_plugins.losses.attention_transfer import AttentionTransferLoss, attention_transfer
from kd_plugins.losses.auto_box import AutoBoxLoss
from kd_plugins.losses.balanced_kl_div import BalancedKLDivLoss, balanced_kl_div
from kd_plugins.losses.base import DistillLoss as DistillLoss
from kd_plugins.losses.binary_kl_div import BinaryKLDivLoss, binary_kl_div
from kd_plugins.losses.box_iou import BoxIoULoss, box_iou
from kd_plugins.losses.box_l1 import BoxL1Loss, box_l1
from kd_plugins.losses.channel_wise import ChannelWiseDivLoss, channel_wise_div
from kd_plugins.losses.cosine import CosineFeatureLoss, cosine_feature
from kd_plugins.losses.dist import DISTLoss, dist
from kd_plugins.losses.dkd import DKDLoss, dkd
from kd_plugins.losses.feature_mse import FeatureMSELoss, feature_mse
from kd_plugins.losses.hard_label import HardLabelLoss, hard_label
from kd_plugins.losses.kl_div import KLDivLoss, kl_div
from kd_plugins.losses.localization_distill import LocalizationDistillLoss, localization_distill
from kd_plugins.losses.logit_mse import LogitMSELoss, logit_mse
from kd_plugins.losses.mask_kl_div import MaskKLDivLoss, mask_kl_div
from kd_plugins.losses.mgd import MGDLoss, mgd
from kd_plugins.losses.ofa import OFALoss, ofa
from kd_plugins.losses.pearson import PearsonLoss, pearson
from kd_plugins.losses.pixelwise_kl_div import PixelwiseKLDivLoss, pixelwise_kl_div
from kd_plugins.losses.relation import RelationLoss, relation
from kd_plugins.losses.yolo_logit import YOLOLogitLoss, yolo_logit

__all__ = [
    'AttentionTransferLoss',
    'AutoBoxLoss',
    'BalancedKLDivLoss',
    'BinaryKLDivLoss',
    'BoxIoULoss',
    'BoxL1Loss',
    'ChannelWiseDivLoss',
    'CosineFeatureLoss',
    'DISTLoss',
    'DKDLoss',
    'FeatureMSELoss',
    'HardLabelLoss',
    'KLDivLoss',
    'LocalizationDistillLoss',
    'LogitMSELoss',
    'MGDLoss',
    'MaskKLDivLoss',
    'OFALoss',
    'PearsonLoss',
    'PixelwiseKLDivLoss',
    'RelationLoss',
    'YOLOLogitLoss',
    'attention_transfer',
    'balanced_kl_div',
    'binary_kl_div',
    'box_iou',
    'box_l1',
    'channel_wise_div',
    'cosine_feature',
    'dist',
    'dkd',
    'feature_mse',
    'hard_label',
    'kl_div',
    'localization_distill',
    'logit_mse',
    'mask_kl_div',
    'mgd',
    'ofa',
    'pearson',
    'pixelwise_kl_div',
    'relation',
    'yolo_logit',
]
