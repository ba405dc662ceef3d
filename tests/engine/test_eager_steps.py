"""Steps that no CUDA graph can hold are run kernel by kernel, and the settings say why."""

from octavo.config import EngineOptions, with_eager_steps
from octavo.engine.build import build_engine, reads_lengths_on_the_host
from octavo.kernels import native, reference_only
from octavo.testing.tiny_llama import write_tiny_llama


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
