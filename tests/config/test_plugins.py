"""Packages that bring architectures: found as installed, imported where they are needed."""

import sys

import pytest
import torch

from octavo.config import Architecture, architectures, model_config_from_hf, plugins
from octavo.config.architectures import architecture_of, broken_plugins
from octavo.errors import ConfigError, UnsupportedModelError
from octavo.layers import Build
from octavo.models import create_model
from octavo.testing.tiny_llama import TINY_CONFIG

ROW = """
from dataclasses import replace
from octavo.config import Architecture
from octavo.config.families.llama import read_llama

def read(config):
    return replace(read_llama(config), architecture={name!r})

ROW = Architecture({name!r}, {hf_name!r}, {name!r}, read, {model!r})
"""
LLAMA = "octavo.models.llama:Llama"
NEW = TINY_CONFIG | {"architectures": ["NewForCausalLM"], "model_type": "new"}


def row(name="new", hf_name="NewForCausalLM", model=LLAMA):
    return ROW.format(name=name, hf_name=hf_name, model=model)


def forget():
    """What is installed is looked up once a process."""
    table = sys.modules["octavo.config.architectures"]._table
    for function in (plugins._installed, plugins.load_plugin, table):
        function.cache_clear()


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a package there as pip would: a module, and a `.dist-info` with its entry point."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(package, source, hf_name="NewForCausalLM", attribute="ROW"):
        module = package.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        entry = f"[octavo.models]\n{hf_name} = {module}:{attribute}\n"
        (info / "entry_points.txt").write_text(entry)
        monkeypatch.delitem(sys.modules, module, raising=False)
        forget()

    yield install
    forget()


def test_a_packages_architecture_is_one_of_all(install):
    install("octavo-new", row())
    found = architectures()["new"]
    assert isinstance(found, Architecture) and found.package == "octavo-new"
    assert model_config_from_hf(NEW).architecture == "new"
    del (by_type := dict(NEW))["architectures"]
    assert model_config_from_hf(by_type).architecture == "new"
    model = create_model(model_config_from_hf(NEW), Build("meta", torch.float32), max_positions=1)
    assert type(model).__name__ == "Llama"
    assert broken_plugins() == ()


def test_it_is_imported_only_where_a_model_needs_it(install):
    install("octavo-new", row())
    assert model_config_from_hf(TINY_CONFIG).architecture == "llama"
    with pytest.raises(UnsupportedModelError, match="supported: .*NewForCausalLM"):
        model_config_from_hf(NEW | {"architectures": ["NoSuchForCausalLM"]})
    assert "octavo_new" not in sys.modules


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import no_such_module", "cannot be imported: ModuleNotFoundError: .*no_such_module"),
        ("raise SystemError('odd')", "cannot be imported: SystemError: odd"),
        ("ROW = 3", "a int, which is no octavo.config.Architecture"),
        ("OTHER = 3", "cannot be imported: AttributeError"),
        (row(hf_name="OtherForCausalLM"), "'OtherForCausalLM' by an entry point that is called"),
        (row(name="llama"), "'llama', which is what LlamaForCausalLM of octavo is called"),
    ],
)
def test_a_broken_package_is_named_and_breaks_its_own_models_alone(install, source, message):
    install("octavo-broken", source)
    install("octavo-sound", row("sound", "SoundForCausalLM"), "SoundForCausalLM")
    with pytest.raises(ConfigError, match=f"package octavo-broken.*{message}"):
        model_config_from_hf(NEW)
    assert model_config_from_hf(TINY_CONFIG).architecture == "llama"
    sound = NEW | {"architectures": ["SoundForCausalLM"]}
    assert model_config_from_hf(sound).architecture == "sound"
    assert {"llama", "sound"} <= architectures().keys() and "new" not in architectures()
    [why] = broken_plugins()
    assert "octavo-broken" in why


def test_a_class_that_octavo_has_is_not_taken_over(install):
    install("octavo-new", row("new", "LlamaForCausalLM"), "LlamaForCausalLM")
    with pytest.raises(ConfigError, match="package octavo-new brings LlamaForCausalLM, which Oct"):
        model_config_from_hf(TINY_CONFIG)
    qwen3 = TINY_CONFIG | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    assert model_config_from_hf(qwen3).architecture == "qwen3"


def test_two_packages_for_one_class_are_both_named(install):
    install("octavo-one", row())
    install("octavo-two", row())
    with pytest.raises(ConfigError, match="NewForCausalLM is brought by octavo-(one|two), octavo-"):
        model_config_from_hf(NEW)
    assert model_config_from_hf(TINY_CONFIG).architecture == "llama"


def test_two_packages_with_one_name_are_told_apart(install):
    install("octavo-one", row())
    install("octavo-two", row(hf_name="OtherForCausalLM"), "OtherForCausalLM")
    assert architecture_of(NEW).package == "octavo-one"
    with pytest.raises(ConfigError, match="package octavo-two .*NewForCausalLM of octavo-one"):
        architecture_of(NEW | {"architectures": ["OtherForCausalLM"]})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("architecture='new'", "architecture='llama'", "its reader makes 'llama' of it"),
        ("return replace", "return 3 or replace", "its reader makes 'int' of it"),
        ("return replace", "return config.no_such", "AttributeError: .*no_such"),
    ],
)
def test_a_reader_that_does_not_work_is_an_error_that_names_the_package(install, old, new, message):
    assert old in row()
    install("octavo-new", row().replace(old, new))
    with pytest.raises(ConfigError, match=f"package octavo-new cannot read .*{message}"):
        model_config_from_hf(NEW)


def test_what_its_reader_refuses_is_refused_as_ever(install):
    install("octavo-new", row())
    with pytest.raises(UnsupportedModelError, match="hidden_act='gelu'"):
        model_config_from_hf(NEW | {"hidden_act": "gelu"})


@pytest.mark.parametrize("model", ["no_such_module:Model", "octavo.models.llama:No", "nonsense"])
def test_a_model_that_cannot_be_imported_is_an_error_that_names_the_package(install, model):
    install("octavo-new", row(model=model))
    config = model_config_from_hf(NEW)
    with pytest.raises(ConfigError, match=f"package octavo-new names '{model}' as the model"):
        create_model(config, Build("meta", torch.float32), max_positions=1)
