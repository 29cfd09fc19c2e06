"""How `ood_core.protocols` finds what its data files name."""
