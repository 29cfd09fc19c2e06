"""Groups of classes: from WordNet, from feature space, or both."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence

import torch
from ood_core import check
from torch import Tensor

__all__ = ["cluster_classes", "partition_classes", "smallest_family", "wordnet_groups"]

_MOST_ROUNDS = 100


def partition_classes(prototypes: Tensor, initial_group: Tensor) -> Tensor:
    """Refine groups of classes in feature space: Lloyd's K-Means on the prototypes, from the given groups.

    Args:
        prototypes: class means [C, D].
        initial_group: int64 [C], groups 0 to E - 1, none empty.

    Returns:
        int64 [C], none of the E groups empty.

    Raises:
        TypeError: not floating-point prototypes, or groups that are not integer.
        ValueError: shapes that do not fit, NaN, a negative or an empty group.

    Source: the paper's feature space separation. Ties go to the lowest group; a group that loses all its classes
    keeps its centre, and at the end takes the class farthest from its own centre.

    Example:
        >>> partition_classes(torch.tensor([[0.0], [0.1], [5.0], [5.1]]), torch.tensor([0, 1, 1, 1]))
        tensor([0, 0, 1, 1])
    """
    (prototypes,) = check.tensors(prototypes=(prototypes, "C D"))
    group = check.labels("initial_group", initial_group, len(prototypes), len(prototypes)).to(prototypes.device)
    count = int(group.max()) + 1
    if empty := sorted(set(range(count)) - set(group.tolist())):
        raise ValueError(f"initial_group has no class in group {empty[0]} of {count}: number the groups without gaps.")
    x = prototypes.double()
    centres = _means(x, group, x.new_zeros(count, x.shape[1]))
    for _ in range(_MOST_ROUNDS):
        nearest = _nearest(x, centres)
        if torch.equal(nearest, group):
            break
        group = nearest
        centres = _means(x, group, centres)
    return _fill_empty(x, group, centres)


def cluster_classes(prototypes: Tensor, n: int, seed: int) -> Tensor:
    """Groups of classes from feature space alone: K-Means from k-means++ centres.

    Args:
        prototypes: class means [C, D].
        n: number of groups, 1 to C.
        seed: of the first centres.

    Returns:
        int64 [C], none of the n groups empty, numbered by their smallest class.

    Raises:
        TypeError: not floating-point prototypes, or `n` or `seed` no integer.
        ValueError: wrong rank, NaN, or more groups than classes.

    Source: the "clustering" row of the paper's Table 5.

    Example:
        >>> cluster_classes(torch.tensor([[5.0], [0.0], [5.1], [0.1]]), 2, seed=0)
        tensor([0, 1, 0, 1])
    """
    (prototypes,) = check.tensors(prototypes=(prototypes, "C D"))
    check.integer("n", n, 1, len(prototypes), "the number of classes")
    generator = torch.Generator().manual_seed(check.integer("seed", seed, 0, 2**63 - 1))
    x = prototypes.double().cpu()
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < n:
        distance = torch.cdist(x, x[chosen]).amin(1).square()
        distance[chosen] = 0
        # Classes on one spot have no distance left to draw by: take any that is not a centre yet.
        weights = distance if distance.any() else torch.ones(len(x)).index_fill(0, torch.tensor(chosen), 0).double()
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    group = _nearest(x, x[chosen])
    group[chosen] = torch.arange(n)
    return _renumbered(partition_classes(x, group)).to(prototypes.device)


def wordnet_groups(edges: Iterable[tuple[str, str]], classes: Sequence[str], n: int) -> Tensor:
    """Groups of classes that are close in meaning: the is-a graph, cut again and again as evenly as it can be.

    Args:
        edges: (parent, child) pairs.
        classes: C different ids of the graph.
        n: number of groups, 1 to C.

    Returns:
        int64 [C] in the order of `classes`; groups are numbered by their smallest member.

    Raises:
        TypeError: `n` no integer.
        ValueError: no class, one given twice or not in the graph, more groups than classes, or a cycle.

    Source: the paper asks for groups from WordNet and gives no rule. Ours: every node keeps the parent with the
    smallest (depth, id); the largest group (of equal ones that with the smallest member) is cut into the classes below
    a node and the rest, by the node that halves it best (then by depth and id).

    Example:
        >>> edges = [("animal", "dog"), ("animal", "cat"), ("thing", "car"), ("root", "animal"), ("root", "thing")]
        >>> wordnet_groups(edges, ["dog", "car", "cat"], 2)
        tensor([1, 0, 1])
    """
    edges, classes = _graph(edges, classes)
    check.integer("n", n, 1, len(classes), "the number of classes")
    depth = _depths(edges)
    below = _classes_below(_single_parents(edges, depth), classes)
    groups = [frozenset(classes)]
    while len(groups) < n:
        largest = min(groups, key=lambda group: (-len(group), min(group)))
        groups.remove(largest)
        part = _best_cut(largest, below, depth)
        groups += [part, largest - part]
    ordered = sorted(groups, key=min)
    return torch.tensor([next(i for i, group in enumerate(ordered) if one in group) for one in classes])


def smallest_family(edges: Iterable[tuple[str, str]], classes: Sequence[str], size: int) -> list[str]:
    """The classes closest in meaning: those below the node that has the fewest of them, but at least `size`.

    Args:
        edges: (parent, child) pairs.
        classes: different ids of the graph.
        size: number of classes asked for; more than there are give all.

    Returns:
        Their ids, sorted; of nodes with as many the deepest counts, of these the smallest id.

    Raises:
        ValueError: as `wordnet_groups`.

    Example:
        >>> edges = [("animal", "dog"), ("animal", "cat"), ("thing", "car"), ("root", "animal"), ("root", "thing")]
        >>> smallest_family(edges, ["dog", "car", "cat"], 2)
        ['cat', 'dog']
    """
    edges, known = _graph(edges, classes)
    depth = _depths(edges)
    below = _classes_below(_single_parents(edges, depth), known)
    enough = [node for node, found in below.items() if len(found) >= size]
    if not enough:
        return sorted(known)
    return sorted(below[min(enough, key=lambda node: (len(below[node]), -depth[node], node))])


# ---- K-Means


def _nearest(x: Tensor, centres: Tensor) -> Tensor:
    return (x[:, None] - centres).square().sum(-1).argmin(1)  # exact distances, so that ties are ties


def _means(x: Tensor, group: Tensor, before: Tensor) -> Tensor:
    """Centres of the groups; an empty one stays where it was."""
    centres = before.clone()
    for index in group.unique().tolist():
        centres[index] = x[group == index].mean(0)
    return centres


def _fill_empty(x: Tensor, group: Tensor, centres: Tensor) -> Tensor:
    group = group.clone()
    for index in range(len(centres)):
        if not (group == index).any():
            distance = (x - centres[group]).square().sum(-1)
            alone = torch.bincount(group, minlength=len(centres))[group] < 2
            group[distance.masked_fill(alone, -1).argmax()] = index
    return group


def _renumbered(group: Tensor) -> Tensor:
    order = list(dict.fromkeys(group.tolist()))
    return torch.tensor([order.index(one) for one in group.tolist()])


# ---- the is-a graph


def _graph(edges: Iterable[tuple[str, str]], classes: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Both as lists, checked."""
    classes = list(classes)
    edges = [(str(parent), str(child)) for parent, child in edges]
    known = {node for edge in edges for node in edge}
    if not classes or len(set(classes)) != len(classes):
        raise ValueError(
            f"classes must be different ids, at least one; got {len(classes)}, {len(set(classes))} different."
        )
    if unknown := [one for one in classes if one not in known]:
        raise ValueError(f"{len(unknown)} classes are not in the graph, first {unknown[0]!r}: give edges for them.")
    return edges, classes


def _depths(edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Fewest edges from a root."""
    children, inner = defaultdict(list), {child for _, child in edges}
    for parent, child in edges:
        children[parent].append(child)
    depth = {parent: 0 for parent, _ in edges if parent not in inner}
    queue = deque(depth)
    while queue:
        node = queue.popleft()
        for child in children[node]:
            if child not in depth:
                depth[child] = depth[node] + 1
                queue.append(child)
    if lost := sorted(inner - set(depth)):
        raise ValueError(f"{len(lost)} nodes, first {lost[0]!r}, hang below no root: the edges run in a circle.")
    return depth


def _single_parents(edges: Sequence[tuple[str, str]], depth: dict[str, int]) -> dict[str, str]:
    parents: dict[str, str] = {}
    for parent, child in edges:
        best = parents.setdefault(child, parent)
        parents[child] = min(best, parent, key=lambda node: (depth[node], node))
    return parents


def _classes_below(parents: dict[str, str], classes: Sequence[str]) -> dict[str, frozenset[str]]:
    """Every node's classes, itself included."""
    below: dict[str, set[str]] = defaultdict(set)
    for one in classes:
        node: str | None = one
        for _ in range(len(parents) + 1):  # a parent of least depth may still lie on a circle
            if node is None:
                break
            below[node].add(one)
            node = parents.get(node)
        else:
            raise ValueError(f"Class {one!r} hangs below itself: the edges run in a circle.")
    return {node: frozenset(found) for node, found in below.items()}


def _best_cut(group: frozenset[str], below: dict[str, frozenset[str]], depth: dict[str, int]) -> frozenset[str]:
    cuts = ((node, group & found) for node, found in below.items())
    proper = [(node, part) for node, part in cuts if 0 < len(part) < len(group)]
    return min(proper, key=lambda cut: (abs(2 * len(cut[1]) - len(group)), depth[cut[0]], cut[0]))[1]
