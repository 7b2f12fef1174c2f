"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mfm_ray.protocols.comparison import Study
from mfm_ray.protocols.digits import DigitsEvaluation
from mfm_ray.protocols.quality import Judgement
from mfm_ray.reporting.page import number


def evaluation_table(evaluation: DigitsEvaluation) -> list[str]:
    """Methods of every problem with reward, calls for one image and confidence of the judge."""
    lines = [["reward", "method", "mean reward", "calls", "judge", "FD, data"]]
    for study in evaluation.studies:
        lines += _study_lines(study, evaluation.judgements[study.problem.name])
    return list(aligned(lines))


def _study_lines(study: Study, judgement: Judgement) -> Iterator[list[str]]:
    for place, score in enumerate(study.scores):
        distance = judgement[score.method.key].frechet_data
        yield [
            study.problem.title if place == 0 else "",
            score.method.label,
            number(score.reward),
            f"{score.nfe:,.0f}",
            f"{float(score.confidence.mean()):.2f}",
            "-" if distance is None else number(distance),
        ]


def aligned(lines: Sequence[Sequence[str]], *, text_columns: int = 2) -> Iterator[str]:
    """Rows in columns: the first `text_columns` to the left, numbers to the right; a rule before each named row."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        if line is not lines[0] and line[0]:
            yield "-" * (sum(widths) + 2 * (len(widths) - 1))
        cells = [
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
