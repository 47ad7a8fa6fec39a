"""Settings: where they come from, what wins, and what a mistake is told."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pd_serve import config, config_docs, values
from pd_serve.config import EngineConfig, NodeConfig
from pd_serve.errors import ConfigError


def load(command: str = "decode", environ: dict[str, str] | None = None, file: Path | None = None, **flags: object):
    return config.load(command, flags, config_file=str(file) if file else None, environ=environ or {})


def test_flag_then_variable_then_file_then_default(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("port: 1\nthreads: 1\nmax_queue: 1\n")
    environ = {"PD_SERVE_PORT": "2", "PD_SERVE_THREADS": "2"}
    loaded = load(environ=environ, file=file, port="3")
    assert (loaded.port, loaded.threads, loaded.max_queue, loaded.block_tokens) == (3, 2, 1, 16)
    assert loaded.role == "decode"


def test_the_file_may_be_named_by_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text("port: 7")
    assert load(environ={"PD_SERVE_CONFIG": str(file)}).port == 7


def test_an_empty_variable_is_as_good_as_none() -> None:
    assert load(environ={"PD_SERVE_PORT": ""}).port == 0


def test_false_is_a_value() -> None:
    assert load(environ={"PD_SERVE_PREFIX_CACHING": "yes"}, prefix_caching=False).prefix_caching is False


def test_yaml_values_of_every_kind(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(
        "kv_cache_memory: 1.5GiB\ncpus: [0, 2-4]\nrouter: ['http://a:1/', 'http://b:2']\nlease_s: 2.5\n"
        "prefix_caching: off\nmodel: 8\n"
    )
    loaded = load(file=file)
    assert loaded.kv_cache_memory == 3 << 29
    assert loaded.cpus == (0, 2, 3, 4)
    assert loaded.router == ("http://a:1", "http://b:2")
    assert loaded.lease_s == 2.5
    assert loaded.prefix_caching is False
    assert loaded.model == "8"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("kv_cache_memry: 1GiB", "unknown setting 'kv_cache_memry'; did you mean 'kv_cache_memory'?"),
        ("kv-cache-memory: 1GiB", "unknown setting 'kv-cache-memory'; did you mean 'kv_cache_memory'?"),
        ("max_attempts: 3", "'max_attempts' is a setting of pd-serve up and router, not of decode"),
        ("[1, 2]", "must hold one setting a line"),
        ("a: [", "is not valid YAML"),
        ("kv_cache_memory: 1 apple", "kv_cache_memory in {file} must be a size like 512MiB or 4GiB, not '1 apple'"),
        ("port: 70000", "port in {file} must be a whole number from 0 to 65535"),
        ("port: true", "port in {file} must be a whole number from 0 to 65535, not True"),
        ("port: {a: 1}", "port in {file} must be"),
        ("lease_s: .nan", "lease_s in {file} must be a number of at least 1"),
        ("prefix_caching: perhaps", "prefix_caching in {file} must be true or false"),
        ("router: localhost:8000", "must be a URL like http://10.0.0.1:8000, not 'localhost:8000'"),
        ("router: 'http://a:99999'", "must be a URL"),
        ("cpus: 3-1", "must be core numbers and ranges like 0-3,8"),
        ("weight_offload_size: 8 layers of 12", "must be a size like 8GiB, a share like 30%"),
        ("weight_offload_size: 120%", "must be a size like 8GiB, a share like 30%"),
        ("weight_offload_size: 1.5layers", "or a number of layers like 12layers, above 0, not '1.5layers'"),
        ("weight_offload_size: 0", "above 0, not '0'"),
        ("weight_offload_params: [mlp]", "must be some of qkv, o, gate_up, down, experts, not 'mlp'"),
        ("dtype: fp8", "dtype in {file} must be one of auto, bfloat16, float32, not 'fp8'"),
    ],
)
def test_mistakes_in_a_file(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "node.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as raised:
        load(file=file)
    assert message.format(file=file) in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "is empty"),
        ("{% for m in messages %}", "line 1"),
        ("{{ messages ", "line 1"),
        ("{% nonsense %}", "nonsense"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_an_error_at_start(
    content: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=f"chat_template.*{file}.*{message}"):
        load(chat_template=str(file)).chat_template_text()


def test_a_chat_template_may_use_what_models_use(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    text = "{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% break %}{% endfor %}"
    file.write_text(text)
    assert load(chat_template=str(file)).chat_template_text() == text
    assert load().chat_template_text() == ""


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file /nowhere"):
        load(file=Path("/nowhere"))


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown variable PD_SERVE_DTYP; did you mean 'PD_SERVE_DTYPE'"):
        load(environ={"PD_SERVE_DTYP": "float32"})


def test_variables_of_other_commands_are_left_alone() -> None:
    environ = {"PD_SERVE_MAX_ATTEMPTS": "not a number", "PD_SERVE_CACHE": "/tmp", "HOME": "/"}
    assert load(environ=environ).port == 0


def test_commands_have_their_own_settings() -> None:
    names = {command: {setting.name for setting in config.settings(command)} for command in config.COMMANDS}
    assert "local_prefill_tokens" in names["decode"] & names["prefill"] & names["up"]  # roles may be switched
    assert "model" not in names["router"]
    assert "role" in names["node"] and "role" not in names["decode"]
    assert (load("node").role, load("node", role="decode").role, load("prefill").role) == ("both", "decode", "prefill")
    assert isinstance(load("up", prefill="2").prefill, int)
    assert load("router", prefill="http://a:1,http://b:1").prefill == ("http://a:1", "http://b:1")


def test_what_up_starts() -> None:
    def counts(**flags: str) -> tuple[int, ...]:
        return tuple(load("up", **flags).counts().values())

    assert (counts(), counts(both="2"), counts(prefill="0")) == ((1, 1, 0), (0, 0, 2), (0, 1, 0))
    assert counts(prefill="2", decode="3", both="1") == (2, 3, 1)
    for flags in ({"decode": "0"}, {"prefill": "1", "decode": "0", "both": "0"}):
        with pytest.raises(ConfigError, match="no node would decode: give --decode or --both"):
            counts(**flags)


@pytest.mark.parametrize("command", config.COMMANDS)
def test_a_configuration_survives_its_file(command: str, tmp_path: Path) -> None:
    flags = {
        "cpus": "1,3-4",
        "kv_cache_memory": "3MiB",
        "router": "http://a:1",
        "api_key": "x,y",
        "prefix_caching": False,
    }
    known = {setting.name for setting in config.settings(command)}
    loaded = config.load(command, {k: v for k, v in flags.items() if k in known}, environ={})
    file = tmp_path / "settings.json"
    file.write_text(config.to_json(command, loaded))
    assert load(command, file=file) == loaded


@pytest.mark.parametrize("command", config.COMMANDS)
def test_every_default_is_a_value_that_its_kind_accepts(command: str) -> None:
    for setting in config.settings(command):
        if setting.default is None:  # it matters whether the setting was given
            assert setting.default_text == ""
            continue
        assert setting.kind.parse(setting.default) == setting.default, setting.name
        assert setting.kind.parse(setting.default_text) == setting.default, setting.name


def test_keys_come_from_both_places(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nkey-1\n\n  key-2  \n")
    loaded = load("router", environ={"PD_SERVE_API_KEY": "key-0"}, api_key_file=str(file))
    assert loaded.api_keys() == {"key-0", "key-1", "key-2"}
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="holds no key"):
        loaded.api_keys()
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        dataclasses.replace(loaded, api_key_file="/nowhere").api_keys()


@pytest.mark.parametrize(
    "kind", [values.SIZE, values.AMOUNT, values.FLAG, values.CORES, values.URL, values.URLS, values.integer(0)]
)
@given(value=st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.lists(st.text())))
def test_any_value_parses_or_says_why(kind: values.Kind, value: object) -> None:
    try:
        kind.parse(value)
    except ValueError as error:
        assert "must be" in str(error)


@given(st.integers(0, 1 << 50))
def test_sizes_survive_rendering(size: int) -> None:
    assert values.SIZE.parse(values.render_size(size)) == size


def test_the_documentation_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configuration.md"
    assert config_docs.main(["--check", str(path)]) == 1
    assert config_docs.main([str(path)]) == 0
    assert config_docs.main(["--check", str(path)]) == 0
    path.write_text(path.read_text() + "x")
    assert config_docs.main(["--check", str(path)]) == 1
    assert "make docs" in capsys.readouterr().out


def test_the_documentation_names_every_setting() -> None:
    text = config_docs.render()
    for command in config.COMMANDS:
        for setting in config.settings(command):
            assert f"`{setting.variable}`" in text
            assert setting.help.replace("|", "\\|") in text


def test_lists_of_sizes_and_numbers_and_ratios(tmp_path: Path) -> None:
    file = tmp_path / "bench.yaml"
    file.write_text("block_sizes: [4KiB, 65536]\ntp: '4:2'\n")
    loaded = load("bench transfer", {"PD_SERVE_BENCH_TRANSFER_DEVICES": "2,3"}, file, in_flight="1, 8")
    assert (loaded.block_sizes, loaded.tp, loaded.devices, loaded.in_flight) == ((4096, 65536), (4, 2), (2, 3), (1, 8))
    assert load("bench serve", {"PD_SERVE_BENCH_REQUESTS": "3"}).requests == 3
    for name, value in {"tp": "2", "block_sizes": "4 apples", "in_flight": "0", "devices": "-1"}.items():
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} must be"):
            load("bench transfer", **{name: value})


SECRET = "long, and random enough"


def test_the_secret_comes_from_a_setting_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text(SECRET + "\n")
    file.chmod(0o600)
    assert load().node_secret() == load("router").node_secret() == ""
    assert load(environ={"PD_SERVE_SECRET": SECRET}).node_secret() == SECRET
    assert load("router", secret_file=str(file)).node_secret() == SECRET
    assert load(secret_file=str(file), secret=SECRET).node_secret() == SECRET
    with pytest.raises(ConfigError, match="both given and differ"):
        load(secret_file=str(file), secret="another one of theirs").node_secret()
    with pytest.raises(ConfigError, match="cannot read /nowhere"):
        load(secret_file="/nowhere").node_secret()
    file.write_text("\n")
    with pytest.raises(ConfigError, match="is empty"):
        load(secret_file=str(file)).node_secret()


def test_a_secret_that_can_be_guessed_or_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match="at least 16 random"):
        load(secret="x").node_secret()
    file = tmp_path / "secret"
    file.write_text(SECRET)
    file.chmod(0o640)
    with pytest.raises(ConfigError, match=f"chmod 600 {file}"):
        load(secret_file=str(file)).node_secret()
    monkeypatch.setattr("os.access", lambda *_: False)  # a read-only volume of somebody else's making
    assert load(secret_file=str(file)).node_secret() == SECRET
    assert "defaultMode" in caplog.text


@pytest.mark.parametrize("key", ["", ",", "a,,b", "a b", "a,b c", "ü"])
def test_a_key_that_would_open_the_router_or_fit_no_header_is_an_error(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        load("router", api_key=key)
    with pytest.raises(ConfigError, match="PD_SERVE_API_KEY"):
        load("router", environ={"PD_SERVE_API_KEY": key})
    file = tmp_path / "keys"
    file.write_text("good\na b\n")
    with pytest.raises(ConfigError, match="spaces"):
        load("router", api_key_file=str(file)).api_keys()
    with pytest.raises(ConfigError, match="--secret is given and empty"):
        load(secret="")


def test_a_port_that_strangers_reach_needs_a_secret() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        load().check_door(host)
    for host in ("0.0.0.0", "::", "10.0.0.1", "node-3"):
        with pytest.raises(ConfigError, match="--secret-file"):
            load().check_door(host)
        load(secret=SECRET).check_door(host)
        load(allow_insecure_nodes=True).check_door(host)


def test_a_url_is_an_address_and_nothing_else() -> None:
    for url in (
        "http://a/x",
        "http://a?x",
        "http://a#x",
        "http://u@a",
        "http://a\\b",
        "http://a\nb",
        "http://a b",
        "//a",
    ):
        with pytest.raises(ConfigError, match="must be a URL"):
            load("router", decode=url)


@pytest.mark.parametrize(
    ("text", "number", "unit"),
    [
        ("8GiB", 8 << 30, "bytes"),
        ("30 %", 30, "%"),
        ("2.5%", 2.5, "%"),
        ("12Layers", 12, "layers"),
        ("1layer", 1, "layers"),
    ],
)
def test_amounts_of_layers(text: str, number: float, unit: str) -> None:
    loaded = load(weight_offload_size=text, weight_offload_params="experts,O")
    assert values.amount(loaded.weight_offload_size) == (number, unit)
    assert loaded.weight_offload_params == ("experts", "o")


def test_options_of_nixl() -> None:
    assert load(nixl_options="a=1,b=c=d").nixl_backend_options() == {"a": "1", "b": "c=d"}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load(nixl_options="a").nixl_backend_options()


@pytest.mark.parametrize(("size", "text"), [(1 << 30, "1GiB"), (1_500_000, "1.5MiB"), (25_362_300_000, "23.7GiB")])
def test_sizes_are_said_as_people_do_and_can_be_typed_back(size: int, text: str) -> None:
    assert values.readable_size(size) == text
    assert values.SIZE.parse(text) >= size  # type: ignore[operator]


def test_an_engine_gets_its_nodes_settings_and_does_not_print_the_secret() -> None:
    node = NodeConfig(role="decode", secret="s3cret-of-many-letters", cpus=(1, 2), max_num_seqs=7)
    config = EngineConfig(**vars(node), node_id="n", address="ipc://a", pulse_address="ipc://b", template="")
    for text in (repr(config), str(config), f"{config}"):
        assert "s3cret" not in text and "decode" in text
    sent = msgspec.json.encode(config)  # on the engine's standard input
    assert b"s3cret" in sent
    assert msgspec.json.decode(sent, type=EngineConfig) == config
