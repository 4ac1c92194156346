"""Stages and what DVC says of them, for `pkt sweep` and `pkt plan`: the only door to DVC's Python interface."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pkt_stages.errors import UserError
from pkt_stages.quiet import quiet_dvc
from pkt_stages.tools.check import GRAPH, check_profiles, whereabouts, without_git
from pkt_stages.tools.provenance import OUTPUTS

_PATTERN = re.compile(r"[*?\[]")  # what makes of a part of a key a pattern, to dpath


class Graph:
    """The stages that `dvc repro TARGETS` would look at, upstream first, and DVC's answers about them.

    Stages are DVC's objects, read once: nobody else changes a stage's entry in dvc.lock before it runs.
    """

    def __init__(self, repo: Any, targets: Sequence[str], *, glob: bool, allow_missing: bool) -> None:
        from dvc.dependency import ParamsDependency
        from dvc.exceptions import DvcException
        from dvc.repo import lock_repo
        from dvc.repo.reproduce import collect_stages, get_active_graph, plan_repro

        self._repo, self._allow_missing = repo, allow_missing
        self._params: dict[str, Any] = {}  # params files, read once each time that DVC's lock is held
        targets = targets or [GRAPH]
        if GRAPH in targets and not os.path.exists(GRAPH):
            raise UserError(f"no {GRAPH} here; {whereabouts()}")
        check_profiles(targets, allow_missing=allow_missing)
        try:
            with lock_repo(repo):
                wanted = collect_stages(repo, targets, glob=glob)
                graph = get_active_graph(self._around(wanted, [os.path.abspath(target) for target in targets]))
                self.stages: list[Any] = plan_repro(graph, wanted)
        except DvcException as error:
            raise UserError(" ".join(str(error).split())) from None
        self.upstream: dict[Any, list[Any]] = {stage: list(graph.successors(stage)) for stage in self.stages}
        for stage in self.stages:
            for dependency in stage.deps:
                if isinstance(dependency, ParamsDependency):
                    dependency.read_params = functools.partial(self._read_params, dependency)

    def _around(self, wanted: Sequence[Any], whole: Sequence[str]) -> Any:
        """DVC's graph of the stage files of these stages, or of the whole project if they use what others may make.

        To read all profiles takes DVC ten seconds.

        Args:
            whole: paths; the stages of such a file are all among the wanted.
        """
        from dvc.repo.index import Index

        more = [Index.from_file(self._repo, path) for path in sorted({s.path for s in wanted}.difference(whole))]
        mine = Index(self._repo, stages=[stage for stage in wanted if stage.path in whole])
        index = Index.from_indexes(self._repo, [mine, *more])
        for dependency in index.deps:
            inside = os.path.relpath(dependency.fs_path, self._repo.root_dir).split(os.sep)[0] in OUTPUTS
            key = dependency.fs.parts(dependency.fs_path)
            if inside and not index.outs_trie.has_node(key) and not index.outs_trie.shortest_prefix(key):
                return self._repo.index.graph
        return index.graph

    def _read_params(self, dependency: Any, **_: Any) -> dict[str, Any]:
        """What a stage names of a params file, by dotted key. DVC itself parses the file anew for every stage."""
        from dvc.utils.serialize import load_path

        path = dependency.fs_path
        if path not in self._params:
            self._params[path] = load_path(path, self._repo.fs)
        if not dependency.params:
            return dict(self._params[path])
        found = {}
        for key in dependency.params:
            with contextlib.suppress(KeyError):
                found[key] = _below(self._params[path], key)
        return found

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """Hold DVC's lock, so that the methods below may be called; False if it is in use for longer than 3 s."""
        from dvc.lock import LockError
        from dvc.repo import lock_repo

        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_repo(self._repo))
            except LockError:
                yield False
            else:
                self._params.clear()
                yield True

    def changed(self, stage: Any, known: Mapping[str, str] | None = None) -> bool:
        """Is it out of date? To be asked once the stages upstream are finished, as `dvc repro` does.

        Args:
            known: MD5 of dependencies by path, which are not looked up on disk.
        """
        return self._changed(stage, self._allow_missing, self.upstream[stage], known or {})

    def missing(self, stage: Any) -> list[str]:
        """Stages upstream of one that is out of date whose new outputs are not on this disk.

        They must be pulled beforehand: `dvc repro -s` does not look upstream, and would take what is missing for what
        the stage was made from.
        """
        if not self._changed(stage, True, self.upstream[stage], {}) or self._changed(stage, True, [], {}):
            return []
        missing = {dependency.fs_path for dependency in stage.deps if not dependency.exists}
        return [u.addressing for u in self.upstream[stage] if any(out.fs_path in missing for out in u.outs)]

    @staticmethod
    def _changed(stage: Any, allow_missing: bool, upstream: list[Any], known: Mapping[str, str]) -> bool:
        """DVC's `Stage.changed`, which besides takes a lock on the files of a stage six times, for a third of the time.

        Only `dvc repro -s` needs that, and meets files in use itself.
        """
        from dvc.exceptions import DvcException

        def deleted(item: Any, status: Mapping[str, Any]) -> bool:
            return allow_missing and status[str(item)] == "deleted"

        made = {out.fs_path: out.hash_info for other in upstream for out in other.outs}
        if stage.changed_stage() or (not stage.frozen and (stage.always_changed or stage.is_callback)):
            return True
        try:
            for dependency in () if stage.frozen else stage.deps:
                path = dependency.fs_path
                if path in known:
                    if dependency.hash_info.value != known[path]:
                        return True
                elif (status := dependency.status()) and (
                    not deleted(dependency, status) or made.get(path, dependency.hash_info) != dependency.hash_info
                ):
                    return True
            for out in stage.outs:
                if (status := out.status()) and not (
                    deleted(out, status) or (allow_missing and status[str(out)] == "not in cache")
                ):
                    return True
        except DvcException:  # e.g. a params file that is no YAML; `dvc repro -s` meets the same and says so
            return True
        return False


def _below(content: dict[str, Any], key: str) -> Any:
    """What dpath, which DVC asks, finds at a dotted key; it walks through all that the mappings on the way hold.

    Raises:
        KeyError: nothing is there.
    """
    import dpath

    found: Any = content
    for part in key.split("."):
        if not isinstance(found, dict) or part not in found or _PATTERN.search(part):
            return dpath.get(content, key, separator=".")
        found = found[part]
    return found


@contextlib.contextmanager
def open_repo() -> Iterator[Any]:
    """DVC's repository around the current folder.

    Raises:
        UserError: there is none.
    """
    with quiet_dvc():
        from dvc.exceptions import DvcException
        from dvc.repo import Repo

        try:
            repo = Repo()
        except DvcException as error:
            raise UserError(f"{error}; {without_git() or whereabouts()}") from None
        with contextlib.closing(repo):
            yield repo
