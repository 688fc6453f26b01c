"""The files in cluster/: against the schemas of what reads them, and against the code that they name.

The schemas of KubeRay are read from the folder that KUBERAY_SCHEMAS names, or from shared/kuberay beside the checkout.
"""

import copy
import gzip
import importlib
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from string import Template
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import ray.dashboard.modules.metrics.dashboards
import torch
import yaml
from prometheus_names import exported
from ray.autoscaler._private.util import fillout_defaults, validate_config
from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

import ardiff.data.storage
from ardiff.cli import COMMANDS, main
from ardiff.config import CONFIGS
from ardiff.data.latents import LatentStatistics
from ardiff.diffusion.config import DiffusionConfig
from ardiff.dit import DiT, DiTConfig
from ardiff.serving.config import ServiceConfig
from ardiff.serving.metrics import MEASURES
from ardiff.train.callbacks import TrainingCallback
from ardiff.train.checkpoint import TrainState
from ardiff.train.config import TrainConfig
from ardiff.train.engines.torch_engine import TorchEngine
from ardiff.train.loop import train
from ardiff.train.tasks import DiTTask, DiTTaskConfig
from ray_jobs.generation.queue import VIDEO_GAUGES
from ray_jobs.runtime.stages import COMMIT
from ray_jobs.serve import shutdown_seconds
from ray_jobs.serving.lint import lint
from ray_jobs.submit import jobs

ROOT = Path(__file__).parents[2]
FILES = ROOT / "cluster"
INSTALLED = "/opt/ardiff/configs"
"""Where the image has configs/."""
COMMAND_OF_MODULE = {COMMANDS[command][0]: command for command in jobs()}
NO_RAYJOB = {
    "quickstart": "writes to a local folder",
    "evaluate-quick": "scores small synthetic videos",
    "serve": "is the RayService",
    "lint-serve": "checks a file",
}
"""Why a command has no manifest of its own."""
NAME_LENGTH = {"RayCluster": 53, "RayJob": 47, "RayService": 47}

BASE = FILES / "base"
OVERLAYS = {"aws": "s3://", "gcp": "gs://", "bare-metal": "s3://"}
"""The overlays, with the kind of their buckets."""


def overlay_values(name: str) -> dict[str, str]:
    """The environment variables that an overlay gives to every pod."""
    overlay = yaml.safe_load((FILES / "overlays" / name / "kustomization.yaml").read_text())
    [values] = [g for g in overlay["configMapGenerator"] if g["name"] == "ardiff-values"]
    return dict(literal.split("=", 1) for literal in values["literals"])


def serve_config(overlay: str) -> str:
    return (FILES / "overlays" / overlay / "serve_config.yaml").read_text()


DOCUMENTS = [
    (file.name, document)
    for file in sorted(BASE.glob("*.yaml"))
    if file.stem != "kustomization"
    for document in yaml.safe_load_all(file.read_text())
]
for _, value in DOCUMENTS:
    if value["kind"] == "RayService":  # as the overlay does
        value["spec"]["serveConfigV2"] = serve_config("aws")
JOBS = [document for _, document in DOCUMENTS if document["kind"] == "RayJob"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RAY = next(re.search("==(.*)", d)[1] for d in PROJECT["optional-dependencies"]["ray"] if d.startswith("ray["))  # type: ignore[index]


def document(kind: str) -> dict[str, Any]:
    [found] = [d for _, d in DOCUMENTS if d["kind"] == kind]
    return found


def clusters() -> list[dict[str, Any]]:
    """The specifications of both clusters."""
    return [document("RayCluster")["spec"], document("RayService")["spec"]["rayClusterConfig"]]


# Against the schemas


def strict(schema: Any) -> Any:
    """The schema with unknown keys as errors, and nothing required that has a default."""
    if isinstance(schema, list):
        return [strict(s) for s in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: strict(value) for key, value in schema.items()}
    properties = schema.get("properties")
    if isinstance(properties, dict) and "type" in schema:
        if "additionalProperties" not in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
        given = [name for name in schema.get("required", []) if "default" not in properties.get(name, {})]
        result["required"] = given
    return result


@pytest.fixture(scope="module")
def schemas() -> dict[str, Any]:
    folder = Path(os.environ.get("KUBERAY_SCHEMAS", ROOT.parent / "shared" / "kuberay"))
    found = sorted(folder.glob("kuberay-*-schemas.json.gz"))
    if not found:
        pytest.skip(f"no KubeRay schemas in {folder}: name their folder in KUBERAY_SCHEMAS")
    with gzip.open(found[-1]) as file:
        return {kind: strict(schema) for kind, schema in json.load(file)["kinds"].items()}


def complaints(schema: dict[str, Any], value: dict[str, Any]) -> list[str]:
    described = {k: v for k, v in value.items() if k not in ("apiVersion", "kind", "metadata")}
    schema = {**schema, "properties": {k: v for k, v in schema["properties"].items() if k != "metadata"}}
    return [f"{e.json_path}: {e.message}" for e in jsonschema.Draft7Validator(schema).iter_errors(described)]


@pytest.mark.parametrize(("name", "value"), [d for d in DOCUMENTS if d[1]["kind"].startswith("Ray")])
def test_manifests_follow_the_schemas_of_kuberay(schemas: dict[str, Any], name: str, value: dict[str, Any]) -> None:
    assert value["apiVersion"] == "ray.io/v1"
    assert complaints(schemas[value["kind"]], value) == [], name


def test_the_schemas_are_strict(schemas: dict[str, Any]) -> None:
    broken = copy.deepcopy(document("RayCluster"))
    broken["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["imagee"] = "x"
    broken["spec"]["workerGroupSpecs"][0]["replicas"] = "1"
    del broken["spec"]["headGroupSpec"]["template"]
    text = "\n".join(complaints(schemas["RayCluster"], broken))
    assert "imagee" in text
    assert "'1' is not of type 'integer'" in text
    assert "'template' is a required property" in text


@pytest.mark.parametrize(("name", "value"), [d for d in DOCUMENTS if not d[1]["kind"].startswith("Ray")])
def test_other_manifests_follow_the_schemas_of_kubernetes(name: str, value: dict[str, Any]) -> None:
    kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)


def refusals(value: dict[str, Any]) -> list[str]:
    """What KubeRay 1.7's operator refuses beyond its schemas, of what these files use."""
    found, spec, name = [], value["spec"], value["metadata"]["name"]
    if not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > NAME_LENGTH[value["kind"]]:
        found.append(f"name {name}")
    if value["kind"] == "RayJob":
        if ("clusterSelector" in spec) == ("rayClusterSpec" in spec):
            found.append("one of clusterSelector and rayClusterSpec")
        if "clusterSelector" in spec:
            found += [k for k in ("suspend", "backoffLimit", "shutdownAfterJobFinishes") if spec.get(k)]
            found += ["SidecarMode"] if spec.get("submissionMode") == "SidecarMode" else []
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
        return found
    cluster = spec if value["kind"] == "RayCluster" else spec["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        parameters = group.get("rayStartParams", {})
        found += [f"rayStartParams {k}={v!r} is no string" for k, v in parameters.items() if not isinstance(v, str)]
        found += ["labels among rayStartParams"] if "labels" in parameters else []
        if group.get("resources") and parameters.keys() & {"num-cpus", "num-gpus", "memory", "resources"}:
            found.append("resources twice")
        if cluster["autoscalerOptions"]["version"] == "v2":
            found += [p for p in [group["template"]["spec"].get("restartPolicy", "Never")] if p != "Never"]
        found += [] if group["template"]["spec"]["containers"] else ["no container"]
    for group in cluster["workerGroupSpecs"]:
        found += [] if 0 <= group["minReplicas"] <= group["maxReplicas"] else [f"replicas of {group['groupName']}"]
    if cluster.get("authOptions", {}).get("mode") == "token" and tuple(map(int, cluster["rayVersion"].split("."))) < (
        2,
        52,
        0,
    ):
        found.append("a token before Ray 2.52")
    found += [gate for gate in ("networkPolicy", "tlsOptions", "historyServerOptions") if gate in cluster]
    return found


@pytest.mark.parametrize(("name", "value"), [d for d in DOCUMENTS if d[1]["kind"].startswith("Ray")])
def test_the_operator_refuses_nothing(name: str, value: dict[str, Any]) -> None:
    assert refusals(value) == [], name


def test_refusals_are_found() -> None:
    job = copy.deepcopy(JOBS[0])
    job["metadata"]["name"] = "Train_DiT"
    job["spec"] |= {"shutdownAfterJobFinishes": True, "submissionMode": "SidecarMode", "rayClusterSpec": {}}
    assert len(refusals(job)) == 4
    cluster = copy.deepcopy(document("RayCluster"))
    cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    cluster["spec"]["workerGroupSpecs"][0]["minReplicas"] = 100
    cluster["spec"]["workerGroupSpecs"][1]["template"]["spec"]["restartPolicy"] = "Always"
    assert len(refusals(cluster)) == 3


def test_ray_up_accepts_the_aws_file() -> None:
    config = yaml.safe_load((FILES / "aws.yaml").read_text())
    validate_config(fillout_defaults(config))
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(fillout_defaults({**config, "max_worker": 1}))
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(fillout_defaults({**config, "head_node_type": "haed"}))


def test_machines_of_the_aws_file_may_pull_the_image_and_not_all_have_gpus() -> None:
    config = fillout_defaults(yaml.safe_load((FILES / "aws.yaml").read_text()))
    registry = config["docker"]["image"].partition("/")[0]
    [login] = config["initialization_commands"]
    region = registry.split(".")[3]
    assert f"aws ecr get-login-password --region {region} | docker login" in login
    assert login.endswith(f" {registry}")
    granted = {a for s in json.loads((FILES / "iam-policy.json").read_text())["Statement"] for a in s["Action"]}
    pulling = {"BatchCheckLayerAvailability", "GetDownloadUrlForLayer", "BatchGetImage", "GetAuthorizationToken"}
    assert {action for action in granted if action.startswith("ecr:")} == {f"ecr:{name}" for name in pulling}
    workers = {name: kind for name, kind in config["available_node_types"].items() if name != "head"}
    assert {kind["node_config"]["InstanceType"].split(".")[0] for kind in workers.values()} == {"c6i", "p4d"}
    assert config["max_workers"] == sum(kind["max_workers"] for kind in workers.values())
    store = r"--env OBJECT_STORE=\d+"
    assert all(re.fullmatch(store, *kind["docker"]["worker_run_options"]) for kind in workers.values())
    assert "--object-store-memory=$OBJECT_STORE" in config["worker_start_ray_commands"][-1]


def test_the_dockerfile_has_no_lint() -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([linter, FILES / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


# Against the code


def resolves(command: str, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The configuration that the command makes of the arguments; fails if it refuses them."""
    here = [str(ROOT / "configs") + a.removeprefix(INSTALLED) if a.startswith(INSTALLED) else a for a in arguments]
    capsys.readouterr()
    code = main([command, *here, "--dry-run"])
    out, err = capsys.readouterr()
    assert code == 0, f"{command} {shlex.join(arguments)}: {err}"
    resolved: dict[str, Any] = yaml.safe_load(out)
    return resolved


def entrypoint(job: dict[str, Any]) -> tuple[str, list[str]]:
    """The command and the arguments that a RayJob runs."""
    text = Template(job["spec"]["entrypoint"]).substitute(overlay_values("aws"))
    python, dash, module, *arguments = shlex.split(text)
    assert (python, dash) == ("python", "-m")
    return COMMAND_OF_MODULE[module], arguments


def test_jobs_fit_the_code_and_each_other(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry point resolves, and each job reads what an earlier one writes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(ardiff.data.storage, "exists", lambda place: False)  # an ablation's plan looks
    entrypoints = {job["metadata"]["name"].removeprefix("ardiff-"): entrypoint(job) for job in JOBS}
    configs = {name: resolves(command, arguments, capsys) for name, (command, arguments) in entrypoints.items()}
    assert {command for command, _ in entrypoints.values()} == set(jobs()) - NO_RAYJOB.keys()
    places = [config["output"] for config in configs.values()]
    assert all(place.startswith("s3://") for place in places)
    assert len(set(places)) == len(places)
    manifest = f"{configs['prepare']['output']}/manifest.parquet"
    first, second, third = (configs[f"train-vae-{n}"] for n in ("1-frames", "2-adversarial", "3-temporal"))
    assert {c["clips"]["manifest"] for c in (first, second, third)} == {manifest}
    assert second["init_from"] == f"{first['output']}/model"
    assert third["init_from"] == f"{second['output']}/model"
    vae = f"{third['output']}/model"
    assert (configs["encode"]["manifest"], configs["encode"]["vae"]) == (manifest, vae)
    assert configs["train-dit"]["latents"] == f"{configs['encode']['output']}/FINGERPRINT"
    assert configs["generate"]["pipeline"] == f"{configs['train-dit']['output']}/pipeline"
    assert configs["evaluate"]["fake"] == [f"{configs['generate']['output']}/manifest.parquet"]
    assert configs["evaluate"]["real"] == manifest
    assert configs["evaluate"]["weights"] == configs["sweep"]["scores"]["weights"] == [weights_place()]
    assert configs["sweep"]["grid"]["checkpoints"] == [configs["generate"]["pipeline"]]
    assert (configs["sweep"]["real"], configs["sweep"]["evaluate"]) == (manifest, "published")
    args = yaml.safe_load(document("RayService")["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert list(args["models"].values()) == [configs["generate"]["pipeline"]]
    workers = {c["train"]["num_workers"] for c in (first, second, third, configs["train-dit"])}
    group = next(g for g in document("RayCluster")["spec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    gpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert max(workers) <= gpus * group["maxReplicas"]


def weights_place() -> str:
    """Where the runbook copies the weights of I3D that it has fetched."""
    copied = r"ardiff weights fetch i3d\nW=(\S+)\naws s3 cp ~/.cache/ardiff/weights/i3d.safetensors \$W\n"
    found = re.search(copied, (FILES / "README.md").read_text())
    assert found is not None
    return found[1]


def test_a_flag_that_is_gone_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    command, arguments = entrypoint(JOBS[0])
    with pytest.raises(AssertionError, match="outputt"):
        resolves(command, [a.replace("output=", "outputt=") for a in arguments], capsys)


def test_the_commands_of_the_runbook_are_understood(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```\n(.*?)```", (FILES / "README.md").read_text(), re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line[1:] for line in lines if line and line[0] == "ardiff"]
    assert len(commands) > 5
    for first, *rest in commands:
        command, arguments = (rest[0], rest[1:]) if first == "submit" else (first, rest)
        if command in COMMANDS:
            config = resolves(command, arguments, capsys)
            scores = config if command == "evaluate" else config["scores"] if command == "sweep" else None
            assert scores is None or scores["weights"] == ["$W"], arguments
    assert {"submit", "doctor", "estimate", "api-key", "lint-serve", "weights"} == {first for first, *_ in commands}
    text = " ".join(blocks)
    assert re.findall(r"(?<=\s)\w[\w.]*=\[", text) == []  # zsh takes brackets for patterns
    assert "sed -i " not in text  # not that of macOS
    assert re.findall(r"\w +# ", text) == []  # zsh takes no comments
    named = {word for line in lines for word in line if word.startswith("cluster/") and "*" not in word}
    assert [name for name in named if not (ROOT / name.partition("#")[0]).exists()] == []


def test_node_pools_of_the_runbook_are_those_of_the_manifests() -> None:
    commands = re.findall(r"^eksctl create (?:cluster|nodegroup) (.*)$", (FILES / "README.md").read_text(), re.M)
    pools = [dict(re.findall(r"--([\w-]+) ([^-\s]\S*)", command)) for command in commands]
    heads = [cluster["headGroupSpec"] for cluster in clusters()]
    workers = [group for cluster in clusters() for group in cluster["workerGroupSpecs"]]

    def machine(group: dict[str, Any]) -> str:
        return str(group["template"]["spec"]["nodeSelector"]["node.kubernetes.io/instance-type"])

    assert [(pool["node-type"], int(pool["nodes"])) for pool in pools[:1]] == [(machine(heads[0]), len(heads))]
    assert {machine(head) for head in heads} == {pools[0]["node-type"]}
    most = {pool["node-type"]: int(pool["nodes-max"]) for pool in pools[1:]}
    assert most == {machine(group): group["maxReplicas"] for group in workers}


def test_the_files_of_the_endpoint_are_right_and_differ_in_their_values_only() -> None:
    spec = document("RayService")["spec"]
    for overlay in OVERLAYS:
        lint(FILES / "overlays" / overlay / "serve_config.yaml")
    assert len({re.sub(r"(?s)^  models:.*^  keys:[^\n]*$", "", serve_config(o), flags=re.M) for o in OVERLAYS}) == 1
    config = yaml.safe_load(spec["serveConfigV2"])
    [deployment] = config["applications"][0]["deployments"]
    [group] = spec["rayClusterConfig"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    resources, asked = pod["containers"][0]["resources"]["limits"], deployment["ray_actor_options"]
    assert deployment["autoscaling_config"]["max_replicas"] == group["maxReplicas"]  # a machine each
    assert asked["num_gpus"] == int(resources["nvidia.com/gpu"])
    assert asked["num_cpus"] <= int(resources["cpu"])
    service = config["applications"][0]["args"]["service"]
    kind, _, variable = service["database_password"].partition(":")
    assert kind == "env"
    for group in [spec["rayClusterConfig"]["headGroupSpec"], *spec["rayClusterConfig"]["workerGroupSpecs"]]:
        environment = group["template"]["spec"]["containers"][0]["env"]
        [secret] = [entry["valueFrom"]["secretKeyRef"] for entry in environment if entry["name"] == variable]
        created = f"create secret generic {secret['name']} --from-literal={secret['key']}="
        assert created in (FILES / "README.md").read_text()
    [policy] = [d for d in yaml.safe_load_all((BASE / "namespace.yaml").read_text()) if d["kind"] == "NetworkPolicy"]
    assert urlsplit(service["database"]).port in {
        p["port"] for rule in policy["spec"]["egress"] for p in rule.get("ports", [])
    }
    drain = service["drain_seconds"]
    assert pod["terminationGracePeriodSeconds"] > shutdown_seconds(ServiceConfig(drain_seconds=drain))
    function = deployment["autoscaling_config"]["policy"]["policy_function"]
    module, _, attribute = function.partition(":")
    assert hasattr(importlib.import_module(module), attribute)
    module, _, attribute = config["applications"][0]["import_path"].partition(":")
    assert hasattr(importlib.import_module(module), attribute)


# The overlays, as kubectl builds them


@pytest.fixture(scope="module")
def build_overlay(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """The documents of an overlay, with a component if one is named. Skips without kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl, whose `kustomize` builds the overlays")

    def build(overlay: str, component: str = "") -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("kustomize") / "cluster"
        shutil.copytree(FILES, folder)
        if component:
            file = folder / "overlays" / overlay / "kustomization.yaml"
            text, count = re.subn(
                r"(?m)^components: \[\]", f"components: [../../components/{component}]", file.read_text()
            )
            assert count == 1
            file.write_text(text)
        command = ["kubectl", "kustomize", folder / "overlays" / overlay]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return list(yaml.safe_load_all(done.stdout))

    return build


def ray_documents(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [d for d in documents if d["kind"] == kind]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlays_are_valid_and_replace_every_value(
    overlay: str, build_overlay: Callable[..., list[dict[str, Any]]], schemas: dict[str, Any]
) -> None:
    documents = build_overlay(overlay)
    assert len(documents) == len(DOCUMENTS) + 2  # two config maps
    for value in documents:
        if value["kind"].startswith("Ray"):
            assert complaints(schemas[value["kind"]], value) == []
            assert refusals(value) == []
        else:
            kubernetes_validate.validate(value, kubernetes_validate.latest_version(), strict=True)
    parts = [value["metadata"]["labels"]["ardiff/part"] for value in documents]
    assert set(parts) == {"namespace", "cluster", "endpoint"} | {
        job["metadata"]["name"].removeprefix("ardiff-") for job in ray_documents(documents, "RayJob")
    }
    text = yaml.safe_dump_all(documents)
    images = set(re.findall(r"image: (\S+)", text))
    assert len(images) == 1
    assert re.fullmatch(r"[\w.-]+\.\w+/(\S+/)?ardiff:" + PROJECT["version"], images.pop())
    assert set(re.findall(r"\w+://(?=ardiff-example-)", text)) == {OVERLAYS[overlay]}
    assert set(
        re.findall(r"\$(\w+)", "".join(j["spec"]["entrypoint"] for j in ray_documents(documents, "RayJob")))
    ) == {
        "RUNS",
        "VIDEOS",
    }
    [service] = ray_documents(documents, "RayService")
    assert service["spec"]["serveConfigV2"] == serve_config(overlay)
    [values] = [d for d in documents if d["metadata"]["name"] == "ardiff-values"]
    assert values["data"] == overlay_values(overlay)
    [cluster] = ray_documents(documents, "RayCluster")
    jobs_pods = [job["spec"]["submitterPodTemplate"] for job in ray_documents(documents, "RayJob")]
    groups = [
        group
        for spec in (cluster["spec"], service["spec"]["rayClusterConfig"])
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    ]
    for template in [*jobs_pods, *(group["template"] for group in groups)]:
        [container] = template["spec"]["containers"]
        assert {"configMapRef": {"name": "ardiff-values"}} in container["envFrom"]
    machines = {str(group["template"]["spec"].get("nodeSelector")) for group in groups}
    assert (machines == {"None"}) == (overlay == "bare-metal")
    if overlay == "bare-metal":
        assert all(
            {"secretRef": {"name": "ardiff-storage"}} in g["template"]["spec"]["containers"][0]["envFrom"]
            for g in groups
        )
        assert "--from-literal=AWS_ACCESS_KEY_ID=" in (FILES / "README.md").read_text()


@pytest.mark.parametrize(
    ("component", "labels"),
    [
        ("kueue", {"kueue.x-k8s.io/queue-name": "ardiff"}),
        ("gang", {"ray.io/gang-scheduling-enabled": "true", "volcano.sh/queue-name": "default"}),
    ],
)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_components_label_the_cluster_of_the_jobs_and_fix_its_size(
    overlay: str,
    component: str,
    labels: dict[str, str],
    build_overlay: Callable[..., list[dict[str, Any]]],
    schemas: dict[str, Any],
) -> None:
    [cluster] = ray_documents(build_overlay(overlay, component), "RayCluster")
    assert complaints(schemas["RayCluster"], cluster) == []
    assert refusals(cluster) == []
    assert labels.items() <= cluster["metadata"]["labels"].items()
    assert cluster["spec"]["enableInTreeAutoscaling"] is False
    assert all(1 <= g["replicas"] == g["minReplicas"] <= g["maxReplicas"] for g in cluster["spec"]["workerGroupSpecs"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_with_redis_heads_may_restart_and_drivers_run_on_workers(
    overlay: str, build_overlay: Callable[..., list[dict[str, Any]]], schemas: dict[str, Any]
) -> None:
    documents = build_overlay(overlay, "head-restart")
    for value in documents:
        if value["kind"].startswith("Ray"):
            assert complaints(schemas[value["kind"]], value) == []
            assert refusals(value) == []
    [cluster], [service] = (ray_documents(documents, kind) for kind in ("RayCluster", "RayService"))
    redis = cluster["spec"]["gcsFaultToleranceOptions"]
    assert redis == service["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert "value" not in redis["redisPassword"], "the password is a secret"
    assert all(job["spec"]["entrypointNumCpus"] > 0 for job in ray_documents(documents, "RayJob"))
    [policy] = ray_documents(documents, "NetworkPolicy")
    ports = [port["port"] for rule in policy["spec"]["egress"] for port in rule.get("ports", [])]
    assert int(redis["redisAddress"].rpartition(":")[2]) in ports


def test_versions_are_the_projects() -> None:
    """Ray's version, Python's, and the image's tag, in every file."""
    text = {file.name: file.read_text() for file in FILES.iterdir() if file.is_file()}
    tags = {tag for content in text.values() for tag in re.findall(r"/ardiff:(\S+)", content)}
    assert tags == {PROJECT["version"]}
    bases = re.findall(r"rayproject/ray:(\S+)", text["Dockerfile"])
    assert {base.split("-")[0] for base in bases} == {RAY}
    assert {base.split("-")[1] for base in bases} == {"py311"}
    assert {cluster["rayVersion"] for cluster in clusters()} == {RAY}
    assert f"ray=={RAY}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_the_image_holds_what_the_files_name() -> None:
    dockerfile = (FILES / "Dockerfile").read_text()
    assert f"configs {INSTALLED}\n" in dockerfile
    sources = [s for line in re.findall(r"^COPY --chown=ray:users (.*)$", dockerfile, re.M) for s in line.split()[:-1]]
    assert [s for s in [*sources, "configs"] if not (ROOT / s).exists()] == []
    assert f"ARG COMMIT=unknown\nENV {COMMIT}=${{COMMIT}} \\\n    {CONFIGS}={INSTALLED} " in dockerfile
    assert "--build-arg COMMIT=$(git describe" in (FILES / "README.md").read_text()
    carried = re.findall(r"^!(\S+)", (FILES / "Dockerfile.dockerignore").read_text(), re.M)
    assert set(carried) == {*sources, "configs"}
    stage = dockerfile.rpartition("FROM ")[2]
    assert "USER 1000" in stage
    assert not re.search("apt|gcc|g\\+\\+|build-essential", stage)


# Secrets, rights, sizes


def pods() -> list[dict[str, Any]]:
    return [g["template"]["spec"] for c in clusters() for g in [c["headGroupSpec"], *c["workerGroupSpecs"]]]


def test_every_node_asks_for_the_token_and_no_file_holds_a_secret() -> None:
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token", "secretName": "ardiff-token"}
    assert "--env RAY_AUTH_MODE=token" in yaml.safe_load((FILES / "aws.yaml").read_text())["docker"]["run_options"]
    for file in FILES.rglob("*"):
        if file.is_file():
            assert not re.search(r"AKIA[0-9A-Z]{16}|[0-9a-f]{64}|BEGIN .*PRIVATE KEY", file.read_text()), file


def test_pods_run_without_rights() -> None:
    for pod in pods():
        assert pod["serviceAccountName"] == "ardiff"
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["resources"]["requests"] == container["resources"]["limits"]


def test_shared_memory_holds_the_object_store_and_memory_holds_both() -> None:
    for cluster in clusters():
        for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
            [shm] = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
            store, limit = int(group["rayStartParams"]["object-store-memory"]) / 2**30, gib(shm["sizeLimit"])
            memory = gib(group["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"])
            assert store < limit < memory / 2
            assert shm["medium"] == "Memory"


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


REQUESTS = {
    "open_filesystem": {"s3:ListBucket"},  # finds the bucket's region
    "read_bytes": {"s3:GetObject"},
    "write_bytes": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "exists": {"s3:GetObject", "s3:ListBucket"},
    "size": {"s3:GetObject"},
    "find_file": {"s3:GetObject"},
    "read_range": {"s3:GetObject"},
    "list_files": {"s3:ListBucket"},
    "list_objects": {"s3:ListBucket"},
    "upload_folder": {"s3:PutObject", "s3:AbortMultipartUpload"},
    "download_folder": {"s3:GetObject", "s3:ListBucket"},
    "download_file": {"s3:GetObject"},
    "delete_file": {"s3:DeleteObject"},
    "delete_files": {"s3:DeleteObject"},
    "delete_folder": {"s3:DeleteObject", "s3:ListBucket", "s3:PutObject"},
    "is_remote": set(),
    "absolute": set(),
    "join": set(),
}
"""The permissions that each function of our storage needs."""
READING = {"open_filesystem", "read_bytes", "exists", "size", "list_files", "download_folder"}


def test_the_policy_allows_what_storage_asks_for_and_no_more() -> None:
    functions = {
        name
        for name, value in vars(ardiff.data.storage).items()
        if inspect.isfunction(value) and value.__module__ == "ardiff.data.storage" and name[0] != "_"
    }
    assert functions <= REQUESTS.keys()
    policy = json.loads((FILES / "iam-policy.json").read_text())
    [prepare] = [arguments for command, arguments in map(entrypoint, JOBS) if command == "prepare"]
    places = dict(argument.split("=s3://") for argument in prepare if "=s3://" in argument)
    runs, videos = (places[name].partition("/")[0] for name in ("output", "source"))
    for bucket, needing in ((runs, REQUESTS.keys()), (videos, READING)):
        granted = {
            action
            for statement in policy["Statement"]
            if any(bucket in resource for resource in statement["Resource"])
            for action in statement["Action"]
        }
        assert granted == set().union(*(REQUESTS[name] for name in needing))
    assert "*" not in [action for statement in policy["Statement"] for action in statement["Action"]]


# What is watched


class Names(TrainingCallback):
    """Hears what training logs."""

    def __init__(self) -> None:
        self.heard: set[str] = set()

    def on_log(self, step: int, values: dict[str, float]) -> None:
        self.heard |= values.keys()


def logged() -> set[str]:
    """The names of what a step of AR-DiT training logs."""
    sizes = DiTConfig(num_frames=2, num_tokens=1, token_dim=2, width=8, depth=1, num_heads=1)
    task = DiTTask(DiT(sizes), DiTTaskConfig(), DiffusionConfig(), LatentStatistics([[0.0] * 2], 1.0))
    config = TrainConfig(num_steps=1, batch_size=2, log_every=1, peak_tflops=1.0)
    batch = {"latents": torch.zeros(2, 2, 1, 2), "label": torch.zeros(2, dtype=torch.int64)}
    engine = TorchEngine(task.model, config.optimizer, torch.device("cpu"))
    names = Names()
    train(task, engine, iter([batch]), config, TrainState(0, 0, ""), [names])
    return names.heard


def test_every_metric_that_is_watched_exists() -> None:
    dashboard = json.loads((FILES / "dashboard.json").read_text())
    alerts = yaml.safe_load((FILES / "alerts.yaml").read_text())
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    assert all(rule["annotations"]["summary"] for rule in rules)
    queries = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", [])]
    queries += [rule["expr"] for rule in rules]
    queries += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    watched = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    ours = {f"ray_ardiff_train_{name}" for name in logged()}
    assert len(watched & ours) > 5
    endpoint = set().union(*(exported(measure) for measure in MEASURES))
    wanted = ("jobs_waiting", "frames_total", "first_frame_seconds_bucket", "frame_evaluations_total", "errors_total")
    for where in ([p["expr"] for panel in dashboard["panels"] for p in panel.get("targets", [])], queries):
        assert {f"ray_ardiff_{name}" for name in wanted} <= {w for q in where for w in re.findall(r"\bray_\w+", q)}
    ours |= {f"ray_{gauge}" for gauge in VIDEO_GAUGES}
    prefixed = {f"ray_{name}" for name in METRICS_GAUGES}
    panels = Path(ray.dashboard.modules.metrics.dashboards.__path__[0]) / "default_dashboard_panels.py"
    rays = prefixed | set(re.findall(r"\bray_\w+", panels.read_text()))
    assert watched - ours - endpoint - rays == set()
    tags = {tag for query in queries for tag in re.findall(r"(\w+)=~?\"", query)}
    assert tags <= {"run", "Location", "kind", "status"}
    grouped = {tag for query in queries for group in re.findall(r"by \(([^)]*)\)", query) for tag in group.split(", ")}
    assert grouped <= {"le", "Location", "instance", *(tag for measure in MEASURES for tag in measure.tags)}
    values = {value for query in queries for value in re.findall(r"(?:kind|status)=\"(\w+)\"", query)}
    code = "".join(file.read_text() for file in (ROOT / "ardiff" / "serving").glob("*.py"))
    assert [value for value in values if f'"{value}"' not in code] == []


def test_panels_do_not_overlap() -> None:
    places = [p["gridPos"] for p in json.loads((FILES / "dashboard.json").read_text())["panels"]]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
