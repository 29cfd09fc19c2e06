"""Operations with more than one implementation; every backend gives the same values."""

from ood_mofe.ops.expert_dispatch import expert_class_token, expert_tokens

__all__ = ["expert_class_token", "expert_tokens"]
