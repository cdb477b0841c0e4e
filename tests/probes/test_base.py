"""Probes by name: one name a kind, those of installed packages too, and what is said of a name that is none.

`known_probes` and `find_probe` ask a registry; here it is an empty one, so that nothing is left behind.
"""

import sys

import pytest

from gapprobe.errors import ConfigError
from gapprobe.probes import base
from gapprobe.registry import Registry


def kind(name, module="theirs", qualname="Kind"):
    return type("Kind", (), {"name": name, "__module__": module, "__qualname__": qualname})


@pytest.fixture
def registry():
    return Registry("probe", "gapprobe.tests")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A package with two entry points: one is a probe, the other's module cannot be imported."""
    (tmp_path / "theirs_by_entry.py").write_text("class Theirs:\n    name = 'theirs'\n")
    about = tmp_path / "theirs_by_entry-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs-by-entry\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[gapprobe.tests]\ntheirs = theirs_by_entry:Theirs\nbroken = no_such_module:Broken\n"
        "[gapprobe.others]\nelse = no_such_module:Else\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("theirs_by_entry", None)


def test_a_kind_is_found_by_its_name_and_named_in_order(registry):
    later, sooner = kind("b", qualname="B"), kind("a", qualname="A")
    registry.add(later)
    registry.add(sooner)
    assert registry.names() == ("a", "b")
    assert registry.find("a") is sooner
    with pytest.raises(ConfigError, match="no probe is called 'c'; there are a, b"):
        registry.find("c")


def test_two_kinds_of_one_name_are_refused_and_the_first_stays(registry):
    first = kind("mine")
    registry.add(first)
    for other in (kind("mine", module="elsewhere"), kind("mine", qualname="Other")):
        with pytest.raises(ConfigError, match="two probes are called 'mine'"):
            registry.add(other)
    assert registry.find("mine") is first


def test_a_kind_that_is_defined_once_more_takes_the_place_of_its_former_self(registry):
    """A notebook's cell that is run again, or a module that is loaded anew."""
    registry.add(kind("mine"))
    again = kind("mine")
    registry.add(again)
    assert registry.find("mine") is again


@pytest.mark.parametrize("nameless", [kind(""), type("Kind", (), {})])
def test_a_kind_without_a_name_is_refused(registry, nameless):
    with pytest.raises(ConfigError, match="has no `name`"):
        registry.add(nameless)
    assert registry.names() == ()


@pytest.mark.usefixtures("installed")
def test_a_packages_probe_is_loaded_when_it_is_asked_for_and_no_other_is(registry):
    assert registry.names() == ("broken", "theirs")
    assert "theirs_by_entry" not in sys.modules
    assert registry.find("theirs").__module__ == "theirs_by_entry"
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        registry.find("broken")


@pytest.mark.usefixtures("installed")
def test_what_is_registered_goes_before_a_packages_of_the_same_name(registry):
    own = kind("broken")
    registry.add(own)
    assert registry.find("broken") is own
    assert registry.names() == ("broken", "theirs")


def test_probes_are_registered_known_and_made_anew(monkeypatch):
    base.known_probes()  # ours are imported with the first question, and must not be with the one below
    monkeypatch.setattr(base, "_PROBES", Registry("probe", "gapprobe.tests"))
    mine = kind("mine")
    mine.strengths, mine.calibrated, mine.fit = (1.0,), False, lambda *_: None
    assert base.register_probe(mine) is mine
    assert base.known_probes() == ("mine",)
    made = base.find_probe("mine")
    assert type(made) is mine
    assert base.find_probe("mine") is not made
    assert base.find_probe(made) is made
