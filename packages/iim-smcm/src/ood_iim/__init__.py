"""Intra-image mining (IIM) and S-MCM: out-of-distribution detection with CLIP-like models from a few images.

IIM keeps both encoders frozen and learns, from the patches of 1 to 16 labelled images per class, a text prompt per
class and negative prompts: the patches that look most like the class are positives, the next ones hard negatives.
S-MCM adds three numbers: the global softmax (MCM), the best patch-to-class matches and the best class-to-patch
matches; higher = more in-distribution. Without negatives it needs no training and is the detector `s_mcm`; the trained
one is `iim`. `functional` holds the equations.

Chen, Fang & Xue, "Intra-image mining and symmetric maximum concept matching for few-shot out-of-distribution
detection", AAAI 2026.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ood_core.lazy import imported_when_used

if TYPE_CHECKING:
    from ood_iim import functional
    from ood_iim.detectors import IIM
    from ood_iim.learner import PromptLearner
    from ood_iim.s_mcm import SMCM

__version__ = "0.1.0"

__all__ = ["IIM", "SMCM", "PromptLearner", "functional"]

__getattr__, __dir__ = imported_when_used(
    __name__, {"IIM": "detectors", "SMCM": "s_mcm", "PromptLearner": "learner", "functional": None}
)
