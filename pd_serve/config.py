"""Every setting of pd-serve, once: its type, default, unit and reason.

A command's settings are the fields of one dataclass; flags, variables (``PD_SERVE_<NAME>``), keys of the
file given with ``--config`` and docs/configuration.md are all derived from them.

The command line calls :func:`load`; every process gets its settings from here, so nothing heavy is imported.
``python -m pd_serve.config [--check] FILE`` writes or checks the documentation.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pd_serve import trust, values
from pd_serve.errors import ConfigError
from pd_serve.settings import Setting, declared, nearest, read_file, setting
from pd_serve.values import choice, decimal, integer, integers

PREFIX = "PD_SERVE_"
# Read where it is used, and by whatever process comes first: a variable only.
CACHE_VARIABLE = PREFIX + "CACHE"
# Those of pd_serve.api.parsers.registry.
TOOL_PARSERS = (
    "auto", "hermes", "llama3_json", "mistral", "pythonic", "granite", "deepseek_v3", "glm45", "qwen3_coder",
    "seed_oss", "kimi_k2", "gemma4", "functiongemma", "openai",
)  # fmt: skip
# Matrices of a layer, as pd_serve.models.weights has them: some of a checkpoint's lie in one.
LAYER_MATRICES = ("qkv", "o", "gate_up", "down", "experts")
BACKENDS = ("vllm", "sglang")  # of pd_serve.router.backends, besides pd-serve's own
REASONING_PARSERS = (
    "auto", "none", "deepseek_r1", "qwen3", "mistral", "seed_oss", "gemma4", "granite", "openai_gptoss",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Common:
    host: str = setting("127.0.0.1", values.TEXT, "Network", "Address to listen on.")
    connect_timeout_s: float = setting(
        4.0,
        decimal(0.1),
        "Network",
        "How long a link between router and node may take to be opened, its ends to prove the secret, and a node to "
        "register.",
        unit="seconds",
    )
    keep_alive_s: float = setting(
        75.0,
        decimal(1.0),
        "Network",
        "How long a connection may stay open between two requests.",
        unit="seconds",
        reason="Longer than the pools of usual clients keep one, so that theirs end first.",
    )
    max_connections: int = setting(
        0,
        integer(0),
        "Network",
        "Open HTTP connections; beyond it those that never sent a request or are idle are closed, and new ones get 503 "
        "where there are none.",
        reason="0: as many as the process may open files, less a tenth.",
    )
    max_head_bytes: int = setting(
        64 << 10,
        values.SIZE,
        "Network",
        "Longest head of a request, URL and headers; 431 or 414 beyond it.",
        reason="Long enough for any proxy's cookies; parsing one of megabytes would stop all streams.",
    )
    max_headers: int = setting(128, integer(1), "Network", "Headers of a request; 431 beyond it.")
    head_timeout_s: float = setting(
        10.0,
        decimal(0.1),
        "Network",
        "How long the head of a request may take from its first byte, and a new connection to send one; 408 then. "
        "A TLS handshake has as long.",
        unit="seconds",
    )
    body_timeout_s: float = setting(
        30.0,
        decimal(0.1),
        "Network",
        "How long a request's body may pause while we read it; 408 then.",
        unit="seconds",
        reason="Longer than a phone's network is away.",
    )
    log_level: str = setting(
        "info", choice("debug", "info", "warning", "error"), "Processes", "Least severe messages to log."
    )
    log_format: str = setting(
        "text",
        choice("text", "json"),
        "Processes",
        "Lines to read, or JSON objects to collect: time, level, process, pid, logger, message; request_id and what "
        "the access log says as fields.",
    )
    otlp_traces_endpoint: str = setting(
        "",
        values.COLLECTOR,
        "Processes",
        "Where OpenTelemetry traces go (OTLP over HTTP), as http://collector:4318/v1/traces. Needs the extra otel.",
        reason="Empty: what OTEL_EXPORTER_OTLP_ENDPOINT and its kind name; none where they do not. OTEL_TRACES_SAMPLER "
        "says which requests.",
    )
    drain_timeout_s: float = setting(
        20.0,
        decimal(0.0),
        "Processes",
        "After SIGTERM, the longest wait for running streams and, on nodes, for leased blocks.",
        unit="seconds",
        reason="Slurm and Kubernetes kill after 30 s; a process needs up to 5 s more to end.",
    )
    engine_timeout_s: float = setting(
        5.0,
        decimal(0.5),
        "Processes",
        "Silence of an engine after which it counts as stopped: its node's /health fails, routers go on elsewhere. A "
        "thread of its own says every second, or every other, that it is there, however long a step takes.",
        unit="seconds",
        reason="Longer than a busy machine keeps a thread from running.",
    )


@dataclass(frozen=True, kw_only=True)
class Secret:
    """What router and nodes know of each other."""

    secret: str = setting(
        "",
        values.SECRET,
        "Security",
        "What router and nodes prove to know before they work with each other, the same for all; at least 16 "
        "random characters. Other users of the machine can read flags: prefer the variable or a file.",
        reason="Empty: routers and nodes trust whoever is on their own machine, and only those.",
    )
    secret_file: str = setting(
        "", values.TEXT, "Security", "File with the secret, readable by its owner alone (chmod 600)."
    )

    def node_secret(self) -> str:
        """The secret, from wherever it was given; empty: none. Raises ConfigError."""
        return trust.secret_of(self.secret, self.secret_file)


@dataclass(frozen=True, kw_only=True)
class Guarded(Common, Secret):
    """Doors of routers and nodes."""

    allow_insecure_nodes: bool = setting(
        False,
        values.FLAG,
        "Security",
        "Work with routers and nodes on other machines without a secret: whoever reaches a port can then join, "
        "read prompts and give orders.",
    )
    ssl_certfile: str = setting(
        "",
        values.TEXT,
        "Security",
        "Certificate (PEM, with its chain) of the HTTP ports and links, which then speak TLS only.",
        reason="Empty: plain HTTP.",
    )
    ssl_keyfile: str = setting(
        "", values.TEXT, "Security", "The certificate's private key.", reason="Empty: it is in ssl_certfile."
    )
    ssl_ca: str = setting(
        "",
        values.TEXT,
        "Security",
        "Certificates (PEM) that routers' and nodes' own are verified against, where their URLs begin with https. With "
        "it nodes speak TLS to each other too, and take nobody without such a certificate.",
        reason="Empty: those that this machine trusts.",
    )

    def check_door(self, host: str, setting: str = "host") -> None:
        """Raises ConfigError where strangers reach a port that asks for nothing."""
        if not trust.is_loopback(host) and not self.node_secret() and not self.allow_insecure_nodes:
            raise ConfigError(
                f"{setting} {host} is no address of this machine alone: give router and nodes the same --secret-file, "
                "or --allow-insecure-nodes where you trust everybody on that network"
            )


@dataclass(frozen=True, kw_only=True)
class EngineSettings(Guarded):
    """What engines serve and how: the same for one node and for all nodes of ``up``."""

    model: str = setting(
        "smollm2-135m",
        values.TEXT,
        "Model",
        "An alias, a directory in HuggingFace form, a .gguf file, or a hub id.",
        reason="Small enough to try everything on a laptop.",
    )
    served_model_name: str = setting(
        "", values.TEXT, "Model", "The name that clients ask for.", reason="Empty: the model's own."
    )
    dtype: str = setting(
        "auto",
        choice("auto", "bfloat16", "float32"),
        "Model",
        "Number format of activations, of weights that are not in FP8 (on CPUs, of all), and of K and V unless "
        "kv_cache_dtype says otherwise.",
        reason="auto: bfloat16 where the device computes in it, else float32.",
    )
    load_format: str = setting(
        "auto",
        choice("auto", "safetensors", "dummy"),
        "Model",
        "Where weights come from; dummy makes them up from config.json alone.",
    )
    max_model_len: int = setting(
        0, integer(0), "Model", "Longest prompt plus output.", unit="tokens", reason="0: the model's own limit."
    )
    chat_template: str = setting(
        "",
        values.TEXT,
        "Model",
        "File with a Jinja chat template, used in place of the model's own.",
        reason="Empty: the model's own.",
    )
    generation_config: str = setting(
        "auto",
        choice("auto", "none"),
        "Model",
        "auto: requests that do not set temperature, top_p and so on get what the model's generation_config.json says.",
        reason="What its makers tried it with.",
    )
    block_size: int = setting(
        0,
        choice(0, 8, 16, 32, 64, 128),
        "KV cache",
        "Tokens a KV block holds; nodes may differ.",
        unit="tokens",
        reason="0: 16 on a CPU, 64 on a GPU, whose decode steps then take 3% less. Small blocks hit more prefixes, "
        "large ones travel in fewer pieces.",
    )
    kv_cache_memory: int = setting(
        0,
        values.SIZE,
        "KV cache",
        "Memory for KV blocks of one node.",
        reason="0: 1GiB on a CPU; on a GPU what --gpu-memory-utilization leaves.",
    )
    kv_cache_dtype: str = setting(
        "auto",
        choice("auto", "fp8", "fp8_e4m3", "bfloat16", "float32"),
        "KV cache",
        "Number format of K and V in the cache; the same on nodes that work together. fp8 and fp8_e4m3 are one format, "
        "half the size of bfloat16.",
        reason="auto: that of dtype, or FP8 where the checkpoint asks for it (kv_cache_scheme) and has scales for it.",
    )
    gpu_memory_utilization: float = setting(
        0.92,
        decimal(0.01),
        "KV cache",
        "Share of a GPU's memory that an engine takes, all together, where kv_cache_memory is not given.",
        reason="The rest is for what other processes take later.",
    )
    host_kv_memory: int = setting(
        0,
        values.SIZE,
        "KV cache",
        "Memory of the host for KV that the cache has no room for; prompts that begin alike get it back from there.",
        reason="0: none. With tp, each rank's. See docs/host-kv.md.",
    )
    host_kv_mode: str = setting(
        "eager",
        choice("eager", "lazy"),
        "KV cache",
        "When KV is copied there: eager, as soon as a block is full; lazy, when its block is about to be given up.",
        reason="eager finds more and moves more; what is stored is never copied again.",
    )
    host_kv_path: str = setting(
        "",
        values.TEXT,
        "KV cache",
        "Directory of a file that is used in place of memory, of the size that host_kv_memory says.",
        reason="Empty: memory. The file has no name, and goes with its engine.",
    )
    prefix_caching: bool = setting(
        True, values.FLAG, "KV cache", "Keep the KV of finished requests for prompts that begin alike."
    )
    tp: int = setting(
        1,
        integer(1),
        "Model",
        "Ranks that share a model's weights and KV cache (tensor parallelism): GPUs of a node, or processes on a CPU.",
        reason="Nodes of a deployment may have different numbers of them.",
    )
    max_num_seqs: int = setting(
        0, integer(0), "Scheduling", "Sequences in one batch.", reason="0: 64 on a CPU, 256 on a GPU."
    )
    max_num_batched_tokens: int = setting(
        0,
        integer(16, or_zero=True),
        "Scheduling",
        "Token budget of one step; longer prompts are computed in chunks of it.",
        unit="tokens",
        reason="While one chunk is computed, the one before it travels. 0: 1,024 on a CPU, 4,096 on a GPU, which "
        "computes larger chunks faster.",
    )
    max_queue: int = setting(
        256,
        integer(0),
        "Scheduling",
        "Requests a node lets wait for memory; it refuses more.",
        reason="429 with Retry-After serves a client better than minutes in a queue.",
    )
    max_queue_wait_s: float = setting(
        10.0,
        decimal(0.1),
        "Scheduling",
        "A node refuses a request that would wait longer for memory, by how fast others got theirs lately.",
        unit="seconds",
        reason="What is accepted keeps its place, however long that takes; streams that have begun are never refused.",
    )
    router_timeout_s: float = setting(
        20.0,
        decimal(1.0),
        "Processes",
        "Silence of a router, answers to pings included, after which a node ends its link and its requests.",
        unit="seconds",
        reason="Until then its requests take memory here; a router that was only paused links again and goes on.",
    )
    transport_timeout_s: float = setting(
        60.0,
        decimal(1.0),
        "KV transfer",
        "How long the transport may take to start before the node ends with an error.",
        unit="seconds",
    )
    step_timeout_s: float = setting(
        60.0,
        decimal(0.1),
        "Scheduling",
        "A step that takes longer hangs, and its node counts as lost: at least so long, and ten times what its tokens "
        "take by the steps before it (the first: ten times this).",
        unit="seconds",
    )
    local_prefill_tokens: int = setting(
        0,
        integer(0),
        "Scheduling",
        "Prompts with at most so many uncached tokens are computed on the node that decodes them.",
        unit="tokens",
        reason="0: never, while there is a prefill node.",
    )
    threads: int = setting(
        0,
        integer(0),
        "Device",
        "Compute threads of an engine.",
        reason="0: one for each core it may use; the engines of `up` share the cores.",
    )
    cpus: tuple[int, ...] = setting(
        (), values.CORES, "Device", "Cores that engines are bound to, such as 0-3,8.", reason="Empty: not bound."
    )
    device: str = setting(
        "auto",
        choice("auto", "cpu", "cuda"),
        "Device",
        "What engines compute on: this machine's cores, or the first GPU that they see.",
        reason="auto: on a GPU where there is one; if it cannot be used that is an error. CUDA_VISIBLE_DEVICES says "
        "which GPUs a process sees; `up` gives each node one of them.",
    )
    enforce_eager: bool = setting(
        False, values.FLAG, "Device", "On a GPU: launch every kernel, instead of replaying decode steps as CUDA graphs."
    )
    profile_cuda_graphs: bool = setting(
        True,
        values.FLAG,
        "Device",
        "Count what CUDA graphs take before the KV cache gets the rest of gpu_memory_utilization.",
        reason="They are captured first, so nothing is estimated. Without it they are captured beside a full KV cache, "
        "beyond that share, with a warning.",
    )
    enable_cumem_allocator: bool | None = setting(
        None,
        values.FLAG,
        "Device",
        "Device memory that peers may map and NICs may register, from the CUDA driver's virtual memory calls.",
        reason="Not given: where there is a GPU whose driver offers them.",
    )
    enable_sleep_mode: bool = setting(
        False,
        values.FLAG,
        "Device",
        "Let nodes be put to sleep (/sleep, /wake_up): they give back KV cache and weights. On GPUs it takes the cumem "
        "allocator, and switches it on.",
    )
    weight_offload: str = setting(
        "off",
        choice("off", "uva", "prefetch"),
        "Device",
        "Keep weights that a GPU has no room for in the host's memory. prefetch: layers are copied to the device while "
        "those before them are computed; uva: kernels read them over the bus.",
        reason="See docs/weight-offload.md.",
    )
    weight_offload_size: str = setting(
        "",
        values.AMOUNT,
        "Device",
        "How much of each GPU's weights, in whole layers: at least so many bytes (8GiB), a share of what "
        "weight_offload_params names (30%), or so many layers (12layers).",
        reason="Needed with weight_offload.",
    )
    weight_offload_params: tuple[str, ...] = setting(
        (),
        values.choices(*LAYER_MATRICES),
        "Device",
        "Which matrices of those layers. qkv are q, k and v, gate_up is gate and up, experts all of theirs.",
        reason="Empty: all. Norms, biases, scales, routers of experts, embedding and lm_head stay on the device.",
    )
    pin_memory: bool = setting(
        True,
        values.FLAG,
        "Device",
        "Pin host memory that is copied to and from GPUs, where that helps.",
        reason="Copies run at the speed of the bus. Not done on machines whose GPU has no memory of its own.",
    )
    transport: str = setting(
        "auto",
        choice("auto", "nvlink", "nixl", "ucx"),
        "KV transfer",
        "How KV blocks travel between nodes.",
        reason="auto: each pair of nodes measures what both have and uses the fastest.",
    )
    checksums: bool = setting(
        True,
        values.FLAG,
        "KV transfer",
        "Compare checksums of all KV blocks, made on both nodes' devices; off where either node says so.",
        reason="Wrong KV is noticed by nothing else, and the checks cost little.",
    )
    nvlink_socket_dir: str = setting(
        "",
        values.TEXT,
        "KV transfer",
        "Directory of the sockets over which GPUs of one machine open their KV memory to each other.",
        reason="Empty: one that only this user can enter. In Kubernetes: a volume that both pods mount.",
    )
    nixl_backend: str = setting("UCX", values.TEXT, "KV transfer", "The NIXL backend that reads.")
    nixl_options: tuple[str, ...] = setting(
        (),
        values.TEXTS,
        "KV transfer",
        "Options of the NIXL backend: KEY=VALUE,... (UCX reads UCX_* variables besides).",
    )
    lease_s: float = setting(
        30.0,
        decimal(1.0),
        "KV transfer",
        "How long a prefill node keeps blocks for a decode node that it hears nothing of.",
        unit="seconds",
        reason="Outlasts a pause; a death strands memory no longer than this.",
    )
    pull_timeout_s: float = setting(
        30.0,
        decimal(0.1),
        "KV transfer",
        "A transfer that makes no progress for so long has failed; the prompt is computed again.",
        unit="seconds",
    )

    peer_handshake_s: float = setting(
        10.0,
        decimal(0.1),
        "KV transfer",
        "How long a connection between two nodes may take from dialling to the end of its self-test.",
        unit="seconds",
        reason="Answers to who knows the secret take milliseconds; a busy machine's take longer.",
    )

    def chat_template_text(self) -> str:
        """What the file ``chat_template`` holds; empty without one. Raises ConfigError."""
        if not self.chat_template:
            return ""
        from pd_serve.api.chat_template import check_template

        try:
            text = Path(self.chat_template).expanduser().read_text(encoding="utf-8")
            check_template(text)
        except (OSError, ValueError) as error:
            raise ConfigError(f"chat_template: {self.chat_template} is no chat template: {error}") from error
        if not text.strip():
            raise ConfigError(f"chat_template: {self.chat_template} is empty; leave it out to use the model's own")
        return text

    @property
    def kv_cache_bytes(self) -> int:
        """0: what the device has left."""
        return self.kv_cache_memory or (0 if self.device == "cuda" else 1 << 30)

    @property
    def block_tokens(self) -> int:
        return self.block_size or (64 if self.device == "cuda" else 16)

    @property
    def batch_limit(self) -> int:
        return self.max_num_seqs or (256 if self.device == "cuda" else 64)

    @property
    def token_budget(self) -> int:
        return self.max_num_batched_tokens or (4096 if self.device == "cuda" else 1024)

    def check_weight_offload(self) -> None:
        """With ``device`` resolved. Raises ConfigError for what does not go together."""
        size, params = self.weight_offload_size, self.weight_offload_params
        if self.weight_offload == "off":
            given = ("--weight-offload-size" if size else "") or ("--weight-offload-params" if params else "")
            if given:
                raise ConfigError(f"{given} is given without --weight-offload: add uva or prefetch, or leave it out")
            return
        if self.device != "cuda":
            raise ConfigError(
                f"--weight-offload {self.weight_offload}: engines compute on the CPU here, whose weights are in the "
                "host's memory already; leave it out"
            )
        if not size:
            raise ConfigError(
                f"--weight-offload {self.weight_offload} needs --weight-offload-size, such as 8GiB, 30% or 12layers"
            )
        if self.weight_offload == "uva" and not self.pin_memory:
            raise ConfigError(
                "--weight-offload uva needs host memory that GPUs can read, and --no-pin-memory forbids to pin it: "
                "leave one of both out, or use prefetch"
            )

    def nixl_backend_options(self) -> dict[str, str]:
        """``nixl_options`` by key. Raises ConfigError."""
        found = {}
        for option in self.nixl_options:
            key, equals, value = option.partition("=")
            if not key or not equals:
                raise ConfigError(f"nixl_options must be KEY=VALUE,..., not {option!r}")
            found[key] = value
        return found


@dataclass(frozen=True, kw_only=True)
class NodeConfig(EngineSettings):
    """Settings of ``pd-serve prefill`` and ``pd-serve decode``, whose names are the role."""

    role: str  # at the start: "prefill" | "decode" | "both"
    port: int = setting(0, integer(0, 65535), "Network", "Port to listen on.", reason="0: any free one.")
    advertise_url: str = setting(
        "", values.URL, "Network", "URL at which routers reach this node.", reason="Empty: made of host and port."
    )
    router: tuple[str, ...] = setting(
        (), values.URLS, "Network", "Routers to register with.", reason="Empty: the routers list this node themselves."
    )
    peer_host: str = setting(
        "",
        values.TEXT,
        "Network",
        "Address at which other nodes' engines reach this one's.",
        reason="Empty: the host it listens on.",
    )


@dataclass(frozen=True, kw_only=True, repr=False)
class EngineConfig(NodeConfig):
    """What an engine process is started with: its node's settings with nothing left to decide, and what belongs to it.

    ``model`` is a directory in HuggingFace form, ``secret`` the secret, from wherever it was given.
    """

    node_id: str
    address: str  # ZeroMQ endpoint of the node process, e.g. ipc:///tmp/.../engine.sock
    pulse_address: str  # the same for the engine's pulse
    template: str  # what the file ``chat_template`` holds; empty: the model's own

    def __repr__(self) -> str:
        """Without the secret: whatever is printed may end up in a log."""
        return f"EngineConfig(role={self.role!r}, node_id={self.node_id!r}, ...)"


@dataclass(frozen=True, kw_only=True)
class AnyNodeConfig(NodeConfig):
    """Settings of ``pd-serve node``."""

    role: str = setting(
        "both",
        choice("prefill", "decode", "both"),
        "Scheduling",
        "What routers use the node for, until POST /role says otherwise.",
        reason="A node of both roles serves alone, too.",
    )


@dataclass(frozen=True, kw_only=True)
class RouterSettings(Guarded):
    """What a router does with requests: the same for one router and for the router of ``up``."""

    port: int = setting(8000, integer(1, 65535), "Network", "Port to listen on.")
    api_key: tuple[str, ...] = setting(
        (),
        values.KEYS,
        "API",
        "Keys that clients must send one of. Other users of the machine can read flags: prefer the variable or a file.",
        reason="Empty: no key is needed.",
    )
    api_key_file: str = setting("", values.TEXT, "API", "File with further keys, one a line.")
    drain_delay_s: float = setting(
        0.0,
        decimal(0.0),
        "Processes",
        "After SIGTERM, how long the router still takes requests while /ready says 503: load balancers need time to "
        "hear that it leaves. The drain follows.",
        unit="seconds",
        reason="Nothing stands before a router by default; 5 to 10 behind a Kubernetes Service.",
    )
    cors_origin: tuple[str, ...] = setting(
        (),
        values.ORIGINS,
        "API",
        "Web pages, by origin, whose scripts may use the API from a browser; * for all.",
        reason="Empty: none.",
    )
    strict_fields: bool = setting(
        False,
        values.FLAG,
        "API",
        "Refuse requests with fields that this server does not know, instead of ignoring them with a line in the log.",
    )
    tool_call_parser: str = setting(
        "auto",
        choice(*TOOL_PARSERS),
        "API",
        "The form of the model's tool calls.",
        reason="auto: by the model's chat template.",
    )
    reasoning_parser: str = setting(
        "auto",
        choice(*REASONING_PARSERS),
        "API",
        "How the model marks its reasoning, which answers hold apart from their content.",
        reason="auto: by the model's chat template. none: it stays in the content.",
    )
    sse_keep_alive_s: float = setting(
        10.0,
        decimal(0.0),
        "API",
        "A stream without a new token for so long gets a comment, so that proxies keep it. The first one takes the 200 "
        "with it: later errors are events.",
        unit="seconds",
        reason="Proxies give up after 30 s and more; no node is waited for so long. 0: never.",
    )
    max_stream_backlog: int = setting(
        4 << 20,
        values.SIZE,
        "Requests",
        "Events that wait for a client which does not read its stream; beyond it the client is cut off.",
        reason="16,000 tokens: a whole answer may wait.",
    )
    request_timeout_s: float = setting(
        600.0,
        decimal(1.0),
        "Requests",
        "A request that makes no progress for so long is given up, whatever it waits for: its body, a node, room, a "
        "token, a client that does not read.",
        unit="seconds",
    )
    ttft_objective_ms: float = setting(
        0.0,
        decimal(0.0),
        "Requests",
        "A request whose first token is expected later than this is refused at once (429 with Retry-After), by the "
        "prompt tokens before it and how fast nodes computed prompts lately.",
        unit="milliseconds",
        reason="0: no objective; the nodes' own bounds on queues hold.",
    )
    max_concurrent_per_key: int = setting(
        0,
        integer(0),
        "Requests",
        "Requests of one API key that are served at a time, by each router process; more are refused (429 with "
        "Retry-After).",
        reason="0: no bound. Without keys there is nobody to tell apart.",
    )
    max_attempts: int = setting(
        4,
        integer(1),
        "Requests",
        "How often a request is tried when nodes fail under it.",
        reason="Survives three losses in a row.",
    )
    node_wait_s: float = setting(
        5.0,
        decimal(0.0),
        "Requests",
        "How long a request waits for a node: after the router's start, and when the last one is lost.",
        unit="seconds",
        reason="A supervisor starts a dead node again within seconds.",
    )
    link_timeout_s: float = setting(
        4.0,
        decimal(0.5),
        "Nodes",
        "Silence of a node's link, answers to pings included, after which the node counts as stopped, cut off or dead.",
        unit="seconds",
    )
    admin_host: str = setting(
        "127.0.0.1",
        values.TEXT,
        "Network",
        "Address of the admin listener: /metrics, /v1/status and /dashboard are there alone where --host is not this "
        "machine only.",
        reason="On another address than loopback it asks for an API key.",
    )
    admin_port: int = setting(0, integer(0, 65535), "Network", "Its port.", reason="0: the one after --port.")
    model_timeout_s: float = setting(
        30.0,
        decimal(0.1),
        "Nodes",
        "How long a node may take to send the tokenizer and chat template of its model.",
        unit="seconds",
        reason="Up to 64 MiB, over any network.",
    )
    access_log: bool = setting(
        True, values.FLAG, "Processes", "Log a line for every answered request: its id, status, tokens and times."
    )
    vllm_metric_names: bool = setting(
        False,
        values.FLAG,
        "Processes",
        "Export what vLLM has metrics for under its names, too (vllm:num_requests_waiting, ...).",
        reason="For boards and autoscalers that exist already. Off: who collects both would count twice.",
    )
    max_body_bytes: int = setting(8 << 20, values.SIZE, "Requests", "Longest body of a request; 413 beyond it.")

    def admin_address(self) -> tuple[str, int] | None:
        """Where operators' paths are; None: where all others are. Raises ConfigError."""
        if trust.is_loopback(self.host) and not self.admin_port:
            return None
        port = self.admin_port or self.port + 1
        if port == self.port or port > 65535:
            raise ConfigError(f"admin_port {port} cannot be beside port {self.port}: choose another --admin-port")
        return self.admin_host, port

    def api_keys(self) -> frozenset[str]:
        """All keys, those of ``api_key_file`` included. Raises ConfigError."""
        return trust.keys_of(self.api_key, self.api_key_file)


@dataclass(frozen=True, kw_only=True)
class RouterConfig(RouterSettings):
    """Settings of ``pd-serve router``."""

    prefill: tuple[str, ...] = setting((), values.URLS, "Nodes", "Prefill nodes that do not register themselves.")
    decode: tuple[str, ...] = setting((), values.URLS, "Nodes", "Decode nodes that do not register themselves.")
    prefill_url: tuple[str, ...] = setting(
        (), values.URLS, "Other engines", "Prefill servers of another engine (see backend)."
    )
    decode_url: tuple[str, ...] = setting((), values.URLS, "Other engines", "Decode servers of another engine.")
    url: tuple[str, ...] = setting(
        (),
        values.URLS,
        "Other engines",
        "Servers of another engine that do both, without a partner.",
    )
    backend: str = setting(
        "vllm", choice(*BACKENDS), "Other engines", "What prefill_url, decode_url and url are servers of."
    )
    backend_api_key: str = setting(
        "", values.TEXT, "Other engines", "Sent to such servers as a bearer token. Other users of the machine can read "
        "flags: prefer the variable.",
    )  # fmt: skip
    tokenizer: tuple[str, ...] = setting(
        (),
        values.TEXTS,
        "Other engines",
        "Directory with tokenizer.json and config.json of the model that such servers serve; NAME=DIRECTORY where "
        "there are several models.",
        reason="Empty: the directory that the server names, where this machine has it, too.",
    )
    discover: tuple[str, ...] = setting(
        (),
        values.NODE_LISTS,
        "Nodes",
        "Where nodes are listed: file:///PATH (one URL a line, read again when it changes), or "
        "k8s://NAMESPACE/SELECTOR (EndpointSlices with these labels, such as app=pd-serve-node, of the cluster that "
        "the router runs in). What follows a URL says that it is another engine's, and for what: vllm prefill, "
        "sglang decode, vllm both; in Kubernetes the labels pd-serve/backend and pd-serve/role do.",
        reason="Empty: nodes register themselves. They may besides.",
    )
    min_prefill: int = setting(
        1, integer(0), "Nodes", "/ready says no with fewer prefill nodes.", reason="0: decode nodes may serve alone."
    )
    min_decode: int = setting(1, integer(1), "Nodes", "/ready says no with fewer decode nodes.")
    workers: int = setting(
        1,
        integer(1, 64),
        "Processes",
        "Router processes that share the port and all nodes.",
        reason="One uses one core.",
    )

    def check_nodes(self) -> None:
        """Raises ConfigError for listed nodes that would be trusted for being there."""
        for role, urls in (("prefill", self.prefill), ("decode", self.decode)):
            for url in urls:
                self.check_door(urlsplit(url).hostname or "", role)


@dataclass(frozen=True, kw_only=True)
class UpConfig(EngineSettings, RouterSettings):
    """Settings of ``pd-serve up``: a router and its nodes on this machine."""

    prefill: int | None = setting(
        None,
        integer(0),
        "Nodes",
        "How many prefill nodes to start.",
        reason="1, or 0 with --both. 0: decode nodes compute prompts too.",
    )
    decode: int | None = setting(
        None, integer(0), "Nodes", "How many decode nodes to start.", reason="1, or 0 with --both."
    )
    both: int = setting(0, integer(0), "Nodes", "How many nodes to start that do both.")
    access_log: bool = setting(
        False,
        values.FLAG,
        "Processes",
        "Log a line for every answered request: its id, status, tokens and times.",
        reason="Off here, where the log is a terminal; on in `pd-serve router`.",
    )

    def counts(self) -> dict[str, int]:
        """How many nodes of each role to start. Raises ConfigError where nothing would decode."""
        usual = 0 if self.both else 1
        prefill, decode = (usual if count is None else count for count in (self.prefill, self.decode))
        if not decode + self.both:
            raise ConfigError("no node would decode: give --decode or --both at least 1")
        return {"prefill": prefill, "decode": decode, "both": self.both}


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Settings of ``pd-serve bench serve``."""

    base_url: str = setting(
        "http://127.0.0.1:8000", values.ENDPOINT, "Endpoint", "The OpenAI endpoint, with or without /v1."
    )
    model: str = setting(
        "", values.TEXT, "Endpoint", "The model to ask for.", reason="Empty: the first that the endpoint offers."
    )
    endpoint: str = setting(
        "completions", choice("completions", "chat"), "Endpoint", "Which API; chat takes text prompts only."
    )
    api_key: str = setting("", values.TEXT, "Endpoint", "Sent as a bearer token.")
    timeout_s: float = setting(600.0, decimal(1.0), "Endpoint", "A longer request has failed.", unit="seconds")
    prompt: str = setting(
        "ids",
        choice("ids", "text"),
        "Requests",
        "Random token ids, exactly input_len of them, or random words, about as many.",
        reason="Every prompt is different: a prefix cache cannot help.",
    )
    max_token_id: int = setting(
        30_000, integer(101), "Requests", "Random token ids are below it; it must be within the vocabulary."
    )
    dataset: str = setting(
        "random",
        values.TEXT,
        "Requests",
        "Made up (random), by input_len and output_len; or a file: conversations in ShareGPT's shape, of which each "
        "first question is asked with the length of its answer; or a trace, of which the first requests are sent "
        "(CSV: timestamp_ms,input_tokens,output_tokens; a line each: [timestamp_ms, input, output, hash_ids]).",
        reason="What is longer than the endpoint says its model takes is left out.",
    )
    trace_speed: float = setting(
        1.0,
        decimal(0.0),
        "Load",
        "How many times faster than they were recorded a trace's requests are sent.",
        reason="0, or a request_rate: when they were recorded does not matter.",
    )
    input_len: int = setting(512, integer(1), "Requests", "Length of a prompt.", unit="tokens")
    output_len: int = setting(64, integer(1), "Requests", "Tokens to ask for.", unit="tokens")
    ignore_eos: bool = setting(
        True,
        values.FLAG,
        "Requests",
        "Ask for output_len tokens whatever the model says (not part of OpenAI's API).",
    )
    temperature: float = setting(0.0, decimal(0.0), "Requests", "0 is greedy.")
    requests: int = setting(32, integer(1), "Load", "Requests to measure.")
    warmup: int = setting(4, integer(0), "Load", "Requests before them that are not measured.")
    concurrency: int = setting(8, integer(1), "Load", "Clients; each sends its next request when its last one ended.")
    request_rate: float = setting(
        0.0,
        decimal(0.0),
        "Load",
        "Requests sent at random times (Poisson), however many are open.",
        unit="1/second",
        reason="0: concurrency decides.",
    )
    seed: int = setting(-1, integer(-1), "Load", "Of prompts and arrival times.", reason="-1: another one each time.")
    json: str = setting("", values.OUTPUT, "Report", "File to write all figures to.", reason="Empty: a table only.")


@dataclass(frozen=True, kw_only=True)
class BenchTransferConfig:
    """Settings of ``pd-serve bench transfer``."""

    transports: tuple[str, ...] = setting(
        (), values.TEXTS, "Endpoint", "Which to measure: nvlink, nixl, ucx.", reason="Empty: all that can be used here."
    )
    device: str = setting(
        "auto",
        choice("auto", "host", "cuda"),
        "Endpoint",
        "Where the two pools are.",
        reason="auto: on the GPUs of --devices where this machine has them, else in host memory.",
    )
    devices: tuple[int, ...] = setting(
        (0, 1), integers(0), "Endpoint", "With cuda: the GPU of the source, and that of the reader."
    )
    memory: str = setting(
        "cumem",
        choice("cumem", "cudamalloc"),
        "Endpoint",
        "With cuda: how the pools are allocated.",
        reason="cumem is what nodes use; cudamalloc is what NIXL's UCX can read over NVLink.",
    )
    size: int = setting(0, values.SIZE, "Load", "Bytes of a pull.", reason="0: 64MiB on the host, 256MiB on GPUs.")
    block_sizes: tuple[int, ...] = setting(
        tuple(1 << n for n in (12, 14, 15, 16, 18, 20, 21, 22)), values.SIZES, "Load", "Bytes of a block."
    )
    in_flight: tuple[int, ...] = setting(
        (1, 16), integers(1), "Load", "Requests at once; they share the bytes of a pull."
    )
    tp: tuple[int, int] = setting(
        (1, 1),
        values.RATIO,
        "Load",
        "Tensor parallelism of source and reader, such as 2:1: the reader pulls heads from every source that has some.",
    )
    source_block_tokens: int = setting(
        16, choice(8, 16, 32, 64, 128), "Load", "Tokens in a block of the source.", unit="tokens"
    )
    reader_block_tokens: int = setting(
        16,
        choice(8, 16, 32, 64, 128),
        "Load",
        "Tokens in a block of the reader.",
        unit="tokens",
        reason="Where they differ, a block size is that of the side with fewer tokens.",
    )
    under_load: bool = setting(
        False, values.FLAG, "Load", "With cuda: also how much slower linears on the reader's GPU are during pulls."
    )
    repeats: int = setting(5, integer(1), "Load", "Pulls of each kind; their median counts.")
    warmup: int = setting(2, integer(0), "Load", "Pulls before them that are not measured.")
    json: str = setting("", values.OUTPUT, "Report", "File to write all figures to.", reason="Empty: a table only.")
    png: str = setting(
        "", values.OUTPUT, "Report", "PNG file to draw the figures into (needs matplotlib, the extra 'bench')."
    )


@dataclass(frozen=True, kw_only=True)
class TokenConfig(Secret):
    """Settings of ``pd-serve token``."""


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Settings of ``pd-serve doctor``."""

    timeout_s: float = setting(
        0.0,
        decimal(0.0),
        "Report",
        "The longest that all may take; what is missing then is said to be missing.",
        unit="seconds",
        reason="0: 15, and more where the machine is busy.",
    )

    json: bool = setting(False, values.FLAG, "Report", "Print the findings as JSON.")
    self_test: bool = setting(
        True, values.FLAG, "Report", "Measure each transport between two processes of this machine."
    )


COMMANDS: dict[str, type[Any]] = {
    "up": UpConfig,
    "prefill": NodeConfig,
    "decode": NodeConfig,
    "node": AnyNodeConfig,
    "router": RouterConfig,
    "bench serve": BenchConfig,
    "bench transfer": BenchTransferConfig,
    "doctor": DoctorConfig,
    "token": TokenConfig,
}

# Tools have variables of their own: their settings are no deployment's.
_TOOLS = {"bench serve": "BENCH_", "bench transfer": "BENCH_TRANSFER_", "doctor": "DOCTOR_"}


def variable_prefix(command: str) -> str:
    return PREFIX + _TOOLS.get(command, "")


def settings(command: str) -> list[Setting]:
    """The settings of a command, group by group."""
    return declared(COMMANDS[command], variable_prefix(command))


def load(
    command: str,
    flags: Mapping[str, object],
    *,
    config_file: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Any:
    """The command's configuration (its class in ``COMMANDS``). ``flags``: those given, by setting name.

    Raises ConfigError for a value, key or variable that is wrong, naming what to change.
    """
    environ = os.environ if environ is None else environ
    known = {setting.name: setting for setting in settings(command)}
    _check_variables(environ)
    config_file = config_file or environ.get(variable_prefix(command) + "CONFIG")
    from_file = read_file(config_file) if config_file else {}
    _check_keys(command, config_file or "", from_file, known)

    chosen: dict[str, object] = {}
    for name, known_setting in known.items():
        for label, source, key in (
            (known_setting.flag, flags, name),
            (known_setting.variable, environ, known_setting.variable),
            (f"{name} in {config_file}", from_file, name),
        ):
            if source.get(key) == "" and known_setting.kind.is_key:
                raise ConfigError(f"{label} is given and empty: leave it out where none is wanted")
            if source.get(key) not in (None, ""):
                try:
                    chosen[name] = known_setting.kind.parse(source[key])
                except ValueError as error:
                    raise ConfigError(f"{label} {error}") from None
                break
    cls = COMMANDS[command]
    return cls(**chosen, role=command) if cls is NodeConfig else cls(**chosen)


def _check_keys(command: str, path: str, content: Mapping[str, object], known: Mapping[str, Setting]) -> None:
    for key in content:
        if key in known:
            continue
        others = [other for other in COMMANDS if any(setting.name == key for setting in settings(other))]
        if others:
            raise ConfigError(f"{path}: '{key}' is a setting of pd-serve {' and '.join(others)}, not of {command}")
        raise ConfigError(f"{path}: unknown setting '{key}'{nearest(str(key), list(known))}")


def _check_variables(environ: Mapping[str, str]) -> None:
    """A variable that no command knows is a mistake; one that only another command knows is not."""
    every = {setting.variable for command in COMMANDS for setting in settings(command)}
    every |= {CACHE_VARIABLE, *(variable_prefix(command) + "CONFIG" for command in COMMANDS)}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in every:
            raise ConfigError(f"unknown variable {variable}{nearest(variable, sorted(every))}")


def to_json(command: str, config: object) -> str:
    """A configuration as a file that the command reads with ``--config`` (JSON is YAML)."""
    found = {setting: getattr(config, setting.name) for setting in settings(command)}
    return json.dumps({setting.name: value for setting, value in found.items() if value != setting.default})


if __name__ == "__main__":
    from pd_serve.config_docs import main

    sys.exit(main(sys.argv[1:]))
