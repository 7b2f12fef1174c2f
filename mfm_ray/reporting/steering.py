"""The part of a report that compares steering methods, one problem after another."""

from __future__ import annotations

from collections.abc import Iterator

from mfm_ray.protocols.comparison import SINGLE_DRAW, UNSTEERED, MethodScore, Study, best_of
from mfm_ray.protocols.digits import MASKED, DigitsEvaluation
from mfm_ray.reporting import charts, page
from mfm_ray.reporting.page import number, text

_ENOUGH = 30.0
"""Effective pool samples from which the reweighted pool is shown as the tilted law."""


def steering_section(evaluation: DigitsEvaluation) -> Iterator[str]:
    protocol = evaluation.protocol
    yield page.heading("Steering towards a reward")
    yield page.paragraph(
        "A reward r says how much an image is wanted. Steering aims at the images of the model reweighted by exp r: "
        "still digits, but wanted ones. The price is counted in calls of network and reward for one image, a backward "
        f"pass counting as a call. All but resampling make {protocol.num_steps} steps: the pool by the ODE, whose "
        f"samples are the cleaner ones, the steered samples by the {protocol.dynamics.upper()}."
    )
    yield page.definitions(
        [
            ("unsteered", "Unsteered", "the model as it is"),
            (
                "best_of_n",
                "Best-of-n",
                f"n samples of the model, of which the best is kept; one pool of {protocol.pool_size:,} serves every "
                "reward and every n, averaged over all groups of n exactly",
            ),
            ("mfm_g", "MFM-G", "follows the gradient of the reward through posterior draws, one or more at each step"),
            ("mfm_gf", "MFM-GF", "needs no gradient: weighs posterior draws by their rewards"),
            (
                "resampling",
                "Resampling",
                f"moves towards one of its posterior draws, picked by reward, in {protocol.resampling_steps} steps",
            ),
            ("muted", "DPS", "the baseline: the reward of the mean prediction, which is no sample"),
        ]
    )
    for study in evaluation.studies:
        yield from _study(study, evaluation)


def summary_section(evaluation: DigitsEvaluation) -> Iterator[str]:
    yield page.heading("All in one table")
    header = ["reward", "unsteered", *(f"best of {n:,}" for n in sorted(evaluation.protocol.best_of) if n > 1)]
    pooled = ("unsteered", "best_of_n")
    steered = [score.method for score in evaluation.studies[0].scores if score.method.family not in pooled]
    header += [method.label for method in steered] + ["judge, MFM-G"]
    lines = []
    for study in evaluation.studies:
        keys = [UNSTEERED, *(best_of(n).key for n in sorted(evaluation.protocol.best_of) if n > 1)]
        keys += [method.key for method in steered]
        confidence = f"{float(study[SINGLE_DRAW].confidence.mean()):.2f}"
        lines.append([text(study.problem.title), *(number(study[key].reward) for key in keys), confidence])
    calls = [f"{study_score.nfe:,.0f}" for study_score in (evaluation.studies[0][key] for key in keys)]
    lines.append(["calls for one image", *calls, ""])
    yield page.paragraph("Mean rewards; higher is better, except where a distribution is the goal.")
    yield page.table(header, lines)


def _study(study: Study, evaluation: DigitsEvaluation) -> Iterator[str]:
    problem = study.problem
    yield page.heading(problem.title, level=3, anchor=problem.name)
    yield page.paragraph(text(problem.explanation))
    yield _target_pictures(study) if problem.name == MASKED else _pictures(study)
    yield page.charts(_charts(study), _chart_caption(study, evaluation))
    yield _score_table(study)


def _target_pictures(study: Study) -> str:
    """One column for each target: what is seen, what each method makes of it, what it was."""
    targets = study.problem.targets
    first = targets[0].pictures["observed"]
    visible = (first != 0).any(dim=-1, keepdim=True).expand_as(first).float()  # the hidden lines hold zeros
    seen = [page.picture(t.pictures["observed"], f"observed: a {t.title}", visible=visible) for t in targets]
    truth = [page.picture(t.pictures["truth"], f"the digit itself: a {t.title}") for t in targets]
    count = len(targets)
    cells = [page.row_name("What is seen"), page.strip(seen, columns=count), page.RULE]
    for score in study.scores:
        if score.method.key in (best_of(1).key,):
            continue
        repeats = 2 if score.method.key == SINGLE_DRAW else 1
        for sample in range(min(repeats, score.images.shape[1])):
            name = score.method.label if sample == 0 else "the same, other noise"
            pictures = [
                page.picture(image, f"{score.method.label}: reward {number(float(reward))}")
                for image, reward in zip(score.images[:, sample], score.image_rewards[:, sample], strict=True)
            ]
            family = score.method.family if sample == 0 else None
            cells += [page.row_name(name, f"{score.nfe:,.0f} calls", family=family)]
            cells += [page.strip(pictures, columns=count)]
    cells += [page.RULE, page.row_name("The digit itself"), page.strip(truth, columns=count)]
    return page.rows(cells, "Held-out digits, one a column. Point at a picture to see its reward.")


def _pictures(study: Study) -> str:
    cells: list[str] = []
    columns = max(score.images.shape[1] for score in study.scores)
    for score in study.scores:
        if score.method.key == best_of(1).key:
            continue
        pictures = [
            page.picture(image, f"{score.method.label}: reward {number(float(reward))}")
            for image, reward in zip(score.images[0], score.image_rewards[0], strict=True)
        ]
        cells += [page.row_name(score.method.label, f"{score.nfe:,.0f} calls", family=score.method.family)]
        cells += [page.strip(pictures, columns=columns)]
    return page.rows(cells, "Samples of each method, not picked; Best-of-n shows as many as the pool has groups of n.")


def _charts(study: Study) -> list[str]:
    first = charts.reward_against_calls(
        [_dot(score, score.nfe, score.reward) for score in study.scores if score.method.key != best_of(1).key],
        title="Reward for calls",
        reference=_reference(study),
    )
    if study.problem.name == "class_mixture":
        return [first, _class_chart(study)]
    shown = [score for score in study.scores if score.method.key != best_of(1).key]
    second = charts.confidence_against_reward(
        [_dot(score, score.reward, float(score.confidence.mean())) for score in shown], title="Is it still a digit?"
    )
    return [first, second]


def _class_chart(study: Study) -> str:
    """Class frequencies of some methods over those of the tilted law."""
    wanted = study.tilted.frequencies
    named = [study[SINGLE_DRAW], next(s for s in study.scores if s.method.family == "mfm_gf")]
    named.append(max((s for s in study.scores if s.method.family == "best_of_n"), key=lambda s: s.nfe))
    series = [("wanted: the model reweighted", "ink", wanted.tolist())]
    series += [(score.method.label, score.method.family, score.frequencies.tolist()) for score in named]
    classes = [str(label) for label in range(len(wanted))]
    return charts.grouped_bars(classes, series, title="Classes that come out", x_label="class", y_label="share")


def _reference(study: Study) -> float | None:
    """The reward that samples of the exact target law have on average."""
    if study.problem.exact_reward is not None:
        return study.problem.exact_reward[0]
    return study.tilted.reward if study.tilted.sample_size >= _ENOUGH else None


def _chart_caption(study: Study, evaluation: DigitsEvaluation) -> str:
    largest = best_of(max(evaluation.protocol.best_of))
    single, best = study[SINGLE_DRAW], study[largest.key]
    count = len(study.problem.targets)
    where = f" on {study.wins(over=largest.key)} of {count} digits" if count > 1 else ""
    if study.problem.name == "class_mixture":
        verdict = (
            f"<b>The classes of MFM-G with one draw are {study.class_distance(SINGLE_DRAW):.2f} away from the wanted "
            f"mix, those of {text(largest.label)} {study.class_distance(largest.key):.2f}</b> (total variation: 0 is "
            "the same, 1 disjoint). A high reward alone does not tell."
        )
    elif single.reward > best.reward:
        verdict = (
            f"<b>MFM-G with one draw ({number(single.reward)}) beats {text(largest.label)} ({number(best.reward)})"
            f"{where}, with {best.nfe / single.nfe:.0f} times fewer calls.</b>"
        )
    else:
        verdict = (
            f"{text(largest.label)} ({number(best.reward)}) has the higher reward here; MFM-G with one draw "
            f"({number(single.reward)}) needs {best.nfe / single.nfe:.0f} times fewer calls."
        )
    if study.problem.exact_reward is not None:
        mean, spread = study.problem.exact_reward
        note = (
            f"The dashed line is the mean reward of a true posterior sample, {number(mean)} ± {number(spread)}: "
            "more would be fitting the noise."
        )
    elif study.tilted.sample_size >= _ENOUGH:
        note = (
            f"The dashed line is the mean reward of the law that steering aims at, by reweighting the pool "
            f"(effective sample size {study.tilted.sample_size:,.0f}): above it is too much of a good thing."
        )
    else:
        note = (
            "Reward alone is the wrong bar: it must still be a digit. The law that steering aims at is out of reach "
            f"of reweighting the pool (effective sample size {study.tilted.sample_size:.1f})."
        )
    return f"{verdict} {note}"


def _score_table(study: Study) -> str:
    header = ["method", "mean reward", "its spread", "calls for one image", "judge"]
    lines, best = [], []
    for number_of_line, score in enumerate(study.scores):
        if score.method.key == SINGLE_DRAW:
            best.append(number_of_line)
        lines.append(
            [
                f'<span class="dot {score.method.family}"></span>{text(score.method.label)}',
                number(score.reward),
                f"± {number(score.spread, 2)}",
                f"{score.nfe:,.0f}",
                f"{float(score.confidence.mean()):.2f}",
            ]
        )
    return page.table(header, lines, best=best)


def _dot(score: MethodScore, x: float, y: float) -> charts.Dot:
    return charts.Dot(x, y, score.method.label, score.method.family, score.spread)
