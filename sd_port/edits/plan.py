"""Where the operations of a drag take patches: along straight lines, in steps of one length."""

import itertools

import numpy as np

from sd_port.checks import Points
from sd_port.edit_configs import DragConfig
from sd_port.edits.operation import Move

MOST_POINTS = 8  # pairs of points that fit without a new compilation; more are padded to the next power of two

Places = tuple[np.ndarray, np.ndarray]  # (points, 2) each: where patches are, and where they go to; -1 for at rest


def plan(source: Points, target: Points, factor: int, config: DragConfig) -> list[Places]:
    """The operations: where patches are, and where they go to, (points, 2) each in latent pixels; -1 for at rest.

    As many as make the longest way one of steps nearest to `step_size`; a patch that a step is too short for rests in
    that operation, but in the published code (compat = "reference") is copied onto itself. Raises ValueError where
    nothing moves, and where there are more of the one than of the other.
    """
    if len(source) != len(target):
        raise ValueError(f"there are {len(source)} source and {len(target)} target points; they come in pairs")
    start, end = source // factor, target // factor
    if not (start != end).any():
        raise ValueError(f"source and target are the same latent pixel: move by at least {factor} pixels")

    def straight(start: np.ndarray, end: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        way = end - start
        length = float(np.linalg.norm(way, axis=1).max())
        count = max(int(length / config.step_size), 1)
        if abs(length / count - config.step_size) > abs(length / (count + 1) - config.step_size):
            count += 1
        if config.compat == "reference":
            places = [start + np.trunc(i / count * way).astype(int) for i in range(count + 1)]
            return list(itertools.pairwise(places))
        places = [start + np.sign(way) * (i * np.abs(way) // count) for i in range(count + 1)]
        steps = [
            (here, there, (here != there).any(axis=1, keepdims=True)) for here, there in itertools.pairwise(places)
        ]
        return [(np.where(goes, here, -1), np.where(goes, there, -1)) for here, there, goes in steps if goes.any()]

    if not config.sequence:
        return straight(start, end)
    moves = []
    for j in range(len(start)):
        if (start[j] == end[j]).all():
            continue
        for here, there in straight(start[j : j + 1], end[j : j + 1]):
            one = np.full_like(start, -1), np.full_like(start, -1)
            one[0][j], one[1][j] = here[0], there[0]
            moves.append(one)
    return moves


def together(plans: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[Move]:
    """One `Move` for every operation, of all pictures, filled up with points that are not active."""
    most = max(len(places) for moves in plans for places, _ in moves)
    points = MOST_POINTS
    while points < most:
        points *= 2
    made = []
    for i in range(max(map(len, plans))):
        source, target = np.full((2, len(plans), points, 2), -1)
        for j, moves in enumerate(plans):
            if i < len(moves):
                source[j, : len(moves[i][0])], target[j, : len(moves[i][0])] = moves[i]
        made.append(Move(source, target, source[..., 0] >= 0))
    return made
