"""Every value is documented and in a case; every case lints, renders as committed and is valid."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

from dgemma_build.chart import cases, helm, kinds
from dgemma_build.chart.cases import CASES, README
from dgemma_build.chart.kinds import VERSIONS

REMAKE = "look at the difference, then run `.venv/bin/python -m dgemma_build.chart --write`"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_lints_strictly(case: Path) -> None:
    assert "0 chart(s) failed" in helm.lint(case)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_renders_as_committed(case: Path) -> None:
    assert cases.golden(case).read_text() == helm.render(case), REMAKE


def test_no_golden_render_without_its_case() -> None:
    assert {path.name for path in cases.GOLDEN.iterdir()} == {case.name for case in CASES}


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(objects: list[kinds.Object], version: str) -> None:
    assert [error for item in objects for error in kinds.errors_of(item, version)] == []


def test_every_value_is_in_a_case() -> None:
    assert {path: where for path, where in cases.exercised().items() if not where} == {}


def test_every_value_is_documented_and_nothing_else() -> None:
    documented = [value.path for value in cases.documented()]
    assert len(set(documented)) == len(documented)
    for leaf, _ in cases.leaves(cases.defaults()):
        assert sum(leaf[: len(path)] == path for path in documented) == 1, leaf


def test_the_readme_has_the_values() -> None:
    assert README.read_text() == cases.readme(), REMAKE


def test_the_check_of_the_acceptance_table_agrees() -> None:
    report = cases.check()
    assert report.problems == ()
    assert report.cases == len(CASES) >= 10
    assert report.values >= 130
    assert report.objects >= 70


def test_the_check_sees_a_changed_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.stem == "defaults")
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden/defaults.yaml").write_text(cases.golden(case).read_text().replace("replicas: 1", "replicas: 2"))
    monkeypatch.setattr(cases, "CASES", (case,))
    monkeypatch.setattr(cases, "GOLDEN", tmp_path / "golden")
    monkeypatch.setattr(cases, "ROOT", tmp_path)
    problems = cases.check().problems
    assert "defaults: golden/defaults.yaml is not what is rendered now" in problems
    assert "model.name is in no case" in problems


def test_writing_makes_all_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README.read_text().replace("| `model.name` |", "| `model.nome` |"))
    (tmp_path / "golden").mkdir()
    (tmp_path / "golden/removed.yaml").write_text("old")
    monkeypatch.setattr(cases, "GOLDEN", tmp_path / "golden")
    monkeypatch.setattr(cases, "README", readme)
    cases.write()
    assert readme.read_text() == README.read_text()
    assert {path.name for path in (tmp_path / "golden").iterdir()} == {case.name for case in CASES}


def test_a_values_file_of_nim_llm_has_all_its_keys() -> None:
    """The keys of that chart's values.yaml, its deprecated ones included; the case sets each of them."""
    case = yaml.safe_load((helm.ROOT / "tests/kubernetes/cases/nim-llm.yaml").read_text())
    words = """affinity autoscaling containerSecurityContext customArgs customCommand env extraVolumeMounts extraVolumes
        healthPort hostPath image imagePullSecrets ingress initContainers livenessProbe metrics model multiNode nfs
        nodeSelector persistence podAnnotations podSecurityContext readinessProbe replicaCount resources service
        serviceAccount startupProbe statefulSet tolerations"""
    assert sorted(case) == sorted(words.split())
    model = "jsonLogging labels legacyCompat logLevel modelStorePath name ngcAPIKey ngcAPISecret nimCache numGpus"
    assert sorted(case["model"]) == sorted([*model.split(), "openaiPort", "subPath"])


def test_the_schema_is_strict_at_every_level() -> None:
    objects = [node for node in kinds.walk(cases.schema()) if isinstance(node, dict) and node.get("type") == "object"]
    with_properties = [node for node in objects if "properties" in node]
    assert len(with_properties) >= 40
    assert all(node["additionalProperties"] is False for node in with_properties)


def test_the_version_is_that_of_the_project() -> None:
    project = tomllib.loads((helm.ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    assert chart["appVersion"] == chart["version"] == project["version"].partition(".dev")[0]


def test_the_example_of_the_readme_is_taken(tmp_path: Path) -> None:
    _, _, rest = README.read_text().partition("```yaml\n")
    values = tmp_path / "my-values.yaml"
    values.write_text(rest.partition("```")[0])
    found = {item["kind"] for item in kinds.read_objects(helm.render(values))}
    assert {"StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget", "Pod"} <= found


def test_another_chart_may_depend_on_it(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    shutil.copytree(helm.CHART, parent / "charts" / helm.CHART.name)
    dependency = {"name": helm.CHART.name, "version": "0.1.0", "alias": "nim-llm", "condition": "nim-llm.enabled"}
    chart = {"apiVersion": "v2", "name": "parent", "version": "1.0.0", "dependencies": [dependency]}
    (parent / "Chart.yaml").write_text(yaml.safe_dump(chart))
    values = tmp_path / "values.yaml"
    for enabled, count in ((True, 7), (False, 0)):
        given = {"global": {"team": "a"}, "nim-llm": {"enabled": enabled, "model": {"name": "dgemma"}}}
        values.write_text(yaml.safe_dump(given))
        assert len(kinds.read_objects(helm.render(values, chart=parent))) == count
