"""Steps that no CUDA graph can hold are run kernel by kernel, and the settings say why."""

from octavo.config import EngineOptions, with_eager_steps
from octavo.engine.build import build_engine, no_graph_because, reads_lengths_on_the_host
from octavo.kernels import native, reference_only
from octavo.testing.tiny_llama import write_tiny_llama
from octavo.testing.tiny_models import write_tiny_model


def test_attention_in_plain_torch_reads_lengths_on_the_host(tmp_path):
    options = EngineOptions.from_flat(
        str(write_tiny_llama(tmp_path / "tiny")), {"device": "cpu", "kv_cache_memory_bytes": 2**22}
    )
    with reference_only():
        engine = build_engine(options)
    assert reads_lengths_on_the_host(engine.kernels)
    compiled = build_engine(options)
    assert reads_lengths_on_the_host(compiled.kernels) == (native.unavailable() is not None)
    eager = with_eager_steps(engine.config, "because")
    assert eager.enforce_eager and not engine.config.enforce_eager
    [setting] = [s for s in eager.settings if s.name == "enforce_eager"]
    assert (setting.value, setting.source, setting.why) == (True, "device", "because")


def test_encoders_run_without_graphs_and_models_that_see_keep_theirs(tmp_path):
    """Whatever attends to images does so before the graph of the step begins."""

    def why(name, **values):
        write_tiny_model(tmp_path / name, name)
        options = EngineOptions.from_flat(str(tmp_path / name), {"device": "cpu"} | values)
        engine = build_engine(options)
        ops = {report.choice.op for report in engine.kernels}
        assert "encoder_attention" in ops
        return no_graph_because(engine.config, engine.kernels)

    assert "each prompt once" in (why("bert") or "")
    if native.unavailable() is None:
        assert why("llava", kv_cache_memory_bytes=2**22) is None
