"""What scripts decide before they run anything."""

import shutil

import pytest

from scripts import audit, browser


def test_the_audit_names_packages_as_the_public_index_knows_them():
    installed = [("torch", "2.13.0+cpu"), ("mfm_ray", "0.1.0"), ("Jinja2", "3.1"), ("typing_extensions", "4.1")]
    assert audit.requirements(installed) == ["jinja2==3.1", "torch==2.13.0", "typing-extensions==4.1"]


def test_a_missing_browser_is_named_with_the_way_to_get_one(monkeypatch, capsys):
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert browser.main() == 2
    assert "apt-get install chromium" in capsys.readouterr().err


@pytest.mark.parametrize("present", [True, False])
def test_what_drives_the_browser_is_installed_only_when_it_is_missing(monkeypatch, present):
    ran = []
    monkeypatch.setenv("CHROMIUM", "/usr/bin/true")
    monkeypatch.setattr(browser.importlib.util, "find_spec", lambda name: object() if present else None)
    monkeypatch.setattr(
        browser.subprocess,
        "run",
        lambda command, cwd: ran.append(command) or browser.subprocess.CompletedProcess(command, 0),
    )
    assert browser.main() == 0
    assert [command[-1] for command in ran] == ([] if present else [".[browser]"])
