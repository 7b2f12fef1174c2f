"""The flags every job takes beside its keys: `--help`, and `--cfg job` for the resolved configuration."""

from collections.abc import Sequence

from mfm_ray.config import compose, flatten, group_choices, load_config, root_class, to_dict, to_yaml
from mfm_ray.errors import InputError
from mfm_ray.settings import expected, leaves, shown


def answer_flags(job: str, words: Sequence[str]) -> str | None:
    """The text that the flags ask for; None when there are none and the job is to run.

    Raises:
        InputError: another flag, or a configuration that `--cfg job` cannot show.
    """
    keys = [word for word in words if not word.startswith("-")]
    flags = [word for word in words if word.startswith("-")]
    if "--cfg" in flags and "job" in keys:
        keys.remove("job")
        flags[flags.index("--cfg")] = "--cfg=job"
    for flag in flags:
        if flag not in ("--help", "-h", "--cfg=job"):
            raise InputError(f"{flag}: unknown flag; expected key=value words, --help or --cfg job")
    if "--help" in flags or "-h" in flags:
        return help_text(job, keys)
    if flags:
        return to_yaml(to_dict(load_config(job, keys))).rstrip()
    return None


def help_text(job: str, words: Sequence[str]) -> str:
    """Every key with its default (as the given words make it), meaning and bounds; and the choices of each group."""
    composed = compose(job, words)
    lines = [f"python -m jobs.{job} key=value ...", ""]
    if composed.choices:
        lines.append("Choices:")
        for group, choice in composed.choices.items():
            lines.append(f"  {group}={choice or ''}  (one of {', '.join(group_choices(group))})")
        lines.append("")
    lines.append("Keys and their defaults:")
    fields = leaves(root_class(job, composed))
    for key, value in flatten(composed.values).items():
        if key in composed.choices or (isinstance(value, dict) and key not in fields):
            continue
        about = f"{fields[key][1].doc}; {expected(*fields[key])}" if key in fields else ""
        lines.append(f"  {f'{key}={shown(value)}':<40} {about}".rstrip())
    return "\n".join([*lines, "", "--cfg job prints the resolved configuration."])
