"""Who is let in."""

import pytest

from mfm_ray.errors import InputError
from serve.errors import ApiError
from serve.keys import Keys, is_loopback


def test_a_key_of_the_list_is_admitted_and_told_apart_from_others_without_being_shown():
    keys = Keys.of(["first", " second "])
    fingerprints = {keys.admit(f"Bearer {key}", "10.0.0.1") for key in ("first", "second")}
    assert len(fingerprints) == 2
    assert not any("first" in print_ or "second" in print_ for print_ in fingerprints)


@pytest.mark.parametrize("header", [None, "", "Bearer ", "Bearer wrong", "Basic first", "first", "Bearer first second"])
def test_anything_but_a_key_of_the_list_is_refused(header):
    with pytest.raises(ApiError) as refused:
        Keys.of(["first"]).admit(header, "127.0.0.1")
    assert refused.value.status == 401
    assert "first" not in refused.value.message


def test_without_keys_only_this_machine_is_answered():
    assert Keys().admit(None, "127.0.0.1") == ""
    assert Keys().admit("Bearer anything", "::1") == ""
    with pytest.raises(ApiError, match="MFM_RAY_API_KEYS"):
        Keys().admit(None, "192.168.0.7")


@pytest.mark.parametrize(
    ("address", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("127.3.2.1", True), ("8.8.8.8", False), (None, False)],
)
def test_addresses_of_this_machine(address, loopback):
    assert is_loopback(address) is loopback


def test_keys_come_from_the_environment_and_a_file(tmp_path):
    file = tmp_path / "keys"
    file.write_text("one  # of the frontend\n\n# nobody\ntwo\n")
    keys = Keys.load(str(file), {"MFM_RAY_API_KEYS": "three, four"})
    assert len(keys.digests) == 4
    assert Keys.load(None, {}) == Keys()
    with pytest.raises(InputError, match="keys_file=/none"):
        Keys.load("/none", {})
    file.write_text("# nothing\n")
    with pytest.raises(InputError, match="holds no key"):
        Keys.load(str(file), {})
