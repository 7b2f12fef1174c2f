"""`make serve`: serves the demo's model and all its rewards until Ctrl-C; trains the model first when there is none.

python -m scripts.run_server [model=DIRECTORY] [rewards=symmetry,brightness] [presets=FILE] [port=8000] [keys_file=FILE]
"""

import signal
import subprocess
import sys
import threading
from pathlib import Path

from jobs.cluster import joins_a_cluster, ray_cluster
from mfm_ray.errors import InputError
from mfm_ray.settings import nearest

DEMO_MODEL = Path("outputs/demo/model")
KEYS = ("model", "rewards", "presets", "port", "keys_file")


def main(words: list[str]) -> int:
    given = read_words(words)
    if "model" not in given:
        if not (DEMO_MODEL / "config.json").is_file():
            print(f"{DEMO_MODEL} is not there yet: make demo comes first", flush=True)
            subprocess.run([sys.executable, "-m", "jobs.demo"], check=True)
        given["model"] = str(DEMO_MODEL)
    serve_until_stopped(given)
    return 0


def read_words(words: list[str]) -> dict[str, str]:
    """key=value words. InputError naming the one that is none."""
    given = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS:
            close = nearest(key, KEYS)
            hint = f"; did you mean {close}?" if close else ""
            raise InputError(f"{word}: expected key=value with a key of {', '.join(KEYS)}{hint}")
        given[key] = value
    if not given.get("port", "1").isdigit():
        raise InputError(f"port={given['port']}: expected a whole number")
    return given


def serve_until_stopped(given: dict[str, str]) -> None:
    from ray import serve

    from serve.deploying import bring_up, notice, read_deployment, require_free_port, shape_errors_of_serve

    port = int(given.pop("port", "8000"))
    deployment = read_deployment(None, args=given, port=port)
    if not joins_a_cluster():
        require_free_port(deployment)
    stopped = threading.Event()
    shape_errors_of_serve()
    with ray_cluster(lambda line: print(line, flush=True)):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        print("starting the endpoint, the sampler and the rewards", flush=True)
        endpoint = bring_up(deployment)
        print(f"serving at {endpoint}/v1 (fields: {endpoint}/docs); {notice(deployment)}; Ctrl-C ends it", flush=True)
        stopped.wait()
        print("stopping", flush=True)
        serve.delete(deployment.app)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"make serve: {error}", file=sys.stderr)
        sys.exit(2)
