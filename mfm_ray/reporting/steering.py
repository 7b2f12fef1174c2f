"""The part of a report that compares steering methods, one problem after another."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor

from mfm_ray import metrics
from mfm_ray.protocols.comparison import SINGLE_DRAW, UNSTEERED, MethodScore, Study, best_of
from mfm_ray.protocols.digits import MASKED, DigitsEvaluation
from mfm_ray.protocols.quality import Judgement, Quality, error_at
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
    judgement = evaluation.judgements[problem.name]
    yield page.charts(_charts(study, evaluation), _chart_caption(study, evaluation))
    yield _score_table(study, judgement)
    yield page.paragraph(_about_distances(study, judgement))
    yield from _proportions_table(study, judgement)
    yield from _curves(study, judgement)


def _about_distances(study: Study, judgement: Judgement) -> str:
    """What the distances of the table are taken to, and what they cannot tell."""
    said = [
        "<b>FD, data</b>: Fréchet distance of the judge's features to all training images, its floor that of as many "
        "training images; an unusual wish must raise it."
    ]
    if judgement.law is not None:
        law = judgement.law
        said.append(
            "<b>FD, law</b>: the same to the tilted law, by annealed Markov chains in the noise of the model's ODE: "
            f"{len(law.rewards):,} in two independent halves, of mean rewards "
            f"{number(float(law.runs[0].rewards.mean()))} and {number(float(law.runs[1].rewards.mean()))}; the floor "
            "is from one half to the other."
        )
    if study.problem.exact_rewards is not None:
        said.append(
            "<b>W1</b>: Wasserstein distance of the rewards to those of a true posterior sample, whose law is known; "
            "distances between images have no reference here."
        )
    elif judgement.law is not None:
        said.append("<b>W1</b>: Wasserstein distance of the rewards to the chains'.")
    else:
        said.append("No distance to the tilted law: its chains were not run here (<code>protocol.law_rewards</code>).")
    said.append("A dash: fewer than 30 effective samples of the pool.")
    return f"<small>{' '.join(said)}</small>"


def _curves(study: Study, judgement: Judgement) -> Iterator[str]:
    """Reward, and the most telling distance to the tilted law, against calls."""
    if not any(score.method.line and score.method.family == "best_of_n" for score in study.further):
        return
    title = study.problem.title
    rewards = _lines(study, lambda score: score.reward)
    svgs = [
        charts.curves(
            rewards,
            title=f"{title}: reward against calls",
            x_label=_CALLS,
            y_label="mean reward",
            log=charts.spans_sizes([y for line in rewards for y in line.y]),
            log_x=True,
            reference=_reference(study, judgement),
            wide=True,
        )
    ]
    distance, name, floor = _distance(study, judgement)
    if distance is not None:
        lines = _lines(study, lambda score: _at_least(distance(judgement[score.method.key]), floor))
        svgs.append(
            charts.curves(
                lines,
                title=f"{title}: distance to the tilted law against calls",
                x_label=_CALLS,
                y_label=name,
                log=True,
                log_x=True,
                reference=floor,
                wide=True,
            )
        )
    said = "Each method over its own range of steps, draws or n. Dotted above: the mean reward of the tilted law."
    if distance is not None:
        said += (
            " Dotted below: what samples of the reference have themselves at that number; nothing under it resolves."
        )
    else:
        said += " The distance to the tilted law is not resolved for this reward at these sizes."
    yield page.charts(svgs, said, wide=True)


_CALLS = "network and reward calls for one image"
_LINE_MARKERS = ("o", "s", "^", "D", "v", "x")


def _lines(study: Study, value: Callable[[MethodScore], float | None]) -> list[charts.Line]:
    """One line for each `Method.line`, its points by calls; further lines of one family dashed, with other markers."""
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for score in study.all_scores:
        found = value(score) if score.method.line else None
        if found is not None:
            points.setdefault((score.method.family, score.method.line), []).append((score.nfe, found))
    lines: list[charts.Line] = []
    for (family, label), places in points.items():
        nth = sum(line.family == family for line in lines)
        x, y = zip(*sorted(places), strict=True)
        lines.append(charts.Line(x, y, label, family, dashed=nth > 0, marker=_LINE_MARKERS[nth]))
    return lines


def _at_least(value: float | None, floor: float | None) -> float | None:
    return None if value is None else max(value, floor or 0.0)


def _distance(study: Study, judgement: Judgement) -> tuple[Callable[[Quality], float | None] | None, str, float | None]:
    """The distance that is charted, its name and its floor at the size of the steered samples."""
    floor = judgement.floor(study[SINGLE_DRAW])
    assert floor is not None
    if judgement.law is not None:
        return (lambda quality: quality.mmd_law), "MMD² of features", floor.mmd_law
    if study.problem.exact_rewards is not None:
        return (lambda quality: quality.reward_w1), "W₁ of rewards", floor.reward_w1
    if study.problem.wanted is not None:
        return (lambda quality: quality.pmf), "|p − w| of classes", floor.pmf
    return None, "", None


def official_section(evaluation: DigitsEvaluation) -> Iterator[str]:
    matches = list(evaluation.official_matches())
    if not matches:
        return
    header = ["", "recipe", "calls", "reward", "error", "ours", "calls", "reward", "error", "share"]
    body = []
    for study, score, match in matches:
        judgement = evaluation.judgements[study.problem.name]
        line = [text(study.problem.title), text(score.method.label), f"{score.nfe:,.0f}", number(score.reward)]
        line.append(_or_dash(judgement[score.method.key].error))
        if match is None:
            line += ["none", *[_DASH] * 4]
        else:
            line += [text(match.method.label), f"{match.nfe:,.0f}", number(match.reward)]
            as_many = error_at(study, judgement, match.method.key, len(score.features))
            line += [_or_dash(as_many), f"{match.nfe / score.nfe:.3f}"]
        body.append(line)
    yield page.heading("The official recipe, and ours at equal quality")
    yield page.paragraph(
        "The paper's recipe of MFM-G (250 linear steps of the ODE, the gradient rescaled to the drift's length; and "
        "the same not rescaled) beside the cheapest setting of ours whose error is no larger. The error is the "
        "distance of the rewards to their law where it is known (W<sub>1</sub>), that of the class proportions where "
        "they are the goal, always for the number of samples that the official recipe has."
    )
    yield page.table(header, body)


_DASH = "\N{EN DASH}"


def _or_dash(value: float | None, digits: int = 3) -> str:
    return _DASH if value is None else number(value, digits)


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


def _charts(study: Study, evaluation: DigitsEvaluation) -> list[str]:
    first = charts.reward_against_calls(
        [_dot(score, score.nfe, score.reward) for score in study.scores if score.method.key != best_of(1).key],
        title="Reward for calls",
        reference=_reference(study, evaluation.judgements[study.problem.name]),
    )
    if study.problem.wanted is not None:
        return [
            first,
            _class_chart(study, study.problem.wanted, evaluation.judgements[study.problem.name]),
            *_draws_charts(study, evaluation),
        ]
    shown = [score for score in study.scores if score.method.key != best_of(1).key]
    second = charts.confidence_against_reward(
        [_dot(score, score.reward, float(score.confidence.mean())) for score in shown], title="Is it still a digit?"
    )
    return [first, second]


def _class_chart(study: Study, wanted: Tensor, judgement: Judgement) -> str:
    """Class frequencies over those that are wanted, of each steered family the method that comes nearest to them."""
    named = []
    for family in ("mfm_g", "mfm_gf"):
        of = [score for score in study.all_scores if score.method.family == family]
        named.append(min(of, key=lambda score: judgement[score.method.key].pmf or 0.0))
    named.append(max((s for s in study.scores if s.method.family == "best_of_n"), key=lambda s: s.nfe))
    series = [("wanted", "ink", wanted.tolist())]
    series += [(score.method.label, score.method.family, score.frequencies.tolist()) for score in named]
    classes = [str(label) for label in range(len(wanted))]
    return charts.grouped_bars(classes, series, title="Classes that come out", x_label="class", y_label="share")


def _over_draws(study: Study) -> list[MethodScore]:
    """The methods that were compared at several numbers of draws."""
    return [score for score in study.further if score.method.num_draws is not None and not score.method.line]


def _draws_charts(study: Study, evaluation: DigitsEvaluation) -> Iterator[str]:
    """Distance of the class proportions against draws a step, over the floor of exact proportions."""
    judgement, scores = evaluation.judgements[study.problem.name], _over_draws(study)
    lines = []
    for family, label in (("mfm_g", "MFM-G"), ("mfm_gf", "MFM-GF"), ("resampling", "Resampling")):
        of = [score for score in scores if score.method.family == family]
        x = [float(score.method.num_draws or 0) for score in of]
        lines.append(charts.Line(x, [judgement[score.method.key].pmf or 0.0 for score in of], label, family))
    if len(lines[0].x) < 2:
        return
    floor = judgement.floor(scores[0])
    yield charts.curves(
        lines,
        title=f"Class proportions, {evaluation.protocol.mixture_steps} steps",
        x_label="posterior draws a step",
        y_label="|p \N{MINUS SIGN} w|",
        log_x=True,
        marker="o",
        reference=None if floor is None else floor.pmf,
    )


def _reference(study: Study, judgement: Judgement) -> float | None:
    """The reward that samples of the exact target law have on average."""
    if study.problem.exact_reward is not None:
        return study.problem.exact_reward[0]
    if judgement.law is not None:
        return float(judgement.law.rewards.mean())
    return study.tilted.reward if study.tilted.sample_size >= _ENOUGH else None


def _chart_caption(study: Study, evaluation: DigitsEvaluation) -> str:
    largest = best_of(max(evaluation.protocol.best_of))
    single, best = study[SINGLE_DRAW], study[largest.key]
    count = len(study.problem.targets)
    where = f" on {study.wins(over=largest.key)} of {count} digits" if count > 1 else ""
    judgement = evaluation.judgements[study.problem.name]
    if study.problem.wanted is not None:
        verdict = _mixture_verdict(study, judgement, largest.key)
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
    elif judgement.law is not None:
        law = judgement.law.rewards
        note = (
            f"The dashed line is the mean reward of the tilted law, {number(float(law.mean()))} ± "
            f"{number(float(law.std()))}, by chains that no steering made: above it is too much of a good thing."
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


def _mixture_verdict(study: Study, judgement: Judgement, largest: str) -> str:
    scores = _over_draws(study) or [study[SINGLE_DRAW]]
    best = min(scores, key=lambda score: judgement[score.method.key].pmf or 0.0)
    floor = judgement.floor(best)
    exact = f"; as many exact draws of the mix: {_or_dash(floor.pmf)}" if floor is not None else ""
    reached, over = _or_dash(judgement[best.method.key].pmf), _or_dash(judgement[largest].pmf)
    return (
        f"<b>The classes of {text(best.method.label)} ({best.nfe:,.0f} calls) are {reached} away from the wanted mix, "
        f"those of {text(study[largest].method.label)} {over}</b> (length of the difference of the shares{exact}). "
        "A high reward alone does not tell."
    )


def _proportions_table(study: Study, judgement: Judgement) -> Iterator[str]:
    """Distance of the class proportions by method and draws a step, with the calls it takes."""
    scores = _over_draws(study)
    if not scores:
        return
    draws = sorted({score.method.num_draws or 0 for score in scores})
    names = {"mfm_g": "MFM-G", "mfm_gf": "MFM-GF", "resampling": "Resampling"}
    body = []
    for family, name in names.items():
        of = {score.method.num_draws: score for score in scores if score.method.family == family}
        cells = [
            f"{_or_dash(judgement[of[n].method.key].pmf, 2)} <small>({of[n].nfe:,.0f} calls)</small>" for n in draws
        ]
        body.append([f'<span class="dot {family}"></span>{name}', *cells])
    floor, count = judgement.floor(scores[0]), len(scores[0].features)
    assert floor is not None
    said = [
        f"|p − w| of {count:,} samples each; as many exact draws of the mix have {_or_dash(floor.pmf, 2)} on average."
    ]
    if judgement.law is not None and study.problem.wanted is not None:
        of_law = metrics.pmf_distance(judgement.law.frequencies, study.problem.wanted)
        said.append(
            f"The tilted law itself is at {number(of_law, 2)} ({len(judgement.law.rewards):,} chains): the model's own "
            "classes are not equally frequent, and steering towards the law keeps that."
        )
    yield page.paragraph(" ".join(said))
    yield page.table(["draws a step", *(str(n) for n in draws)], body)


def _score_table(study: Study, judgement: Judgement) -> str:
    columns = {
        "FD, data": lambda quality: quality.frechet_data,
        "FD, law": lambda quality: quality.frechet_law,
        "W1": lambda quality: quality.reward_w1,
        "|p − w|": lambda quality: quality.pmf,
    }
    floor = judgement.floor(study[SINGLE_DRAW])
    assert floor is not None
    columns = {name: of for name, of in columns.items() if of(floor) is not None}
    header = ["method", "mean reward", "its spread", "calls", "judge", *columns]
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
                *(_or_dash(of(judgement[score.method.key])) for of in columns.values()),
            ]
        )
    count = len(study[SINGLE_DRAW].features)
    lines.append(
        [f"floor: {count:,} samples of the reference", *[""] * 4, *(_or_dash(of(floor)) for of in columns.values())]
    )
    return page.table(header, lines, best=best)


def _dot(score: MethodScore, x: float, y: float) -> charts.Dot:
    return charts.Dot(x, y, score.method.label, score.method.family, score.spread)
