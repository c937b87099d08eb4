"""Preparing a log against the same steps in pandas: read, validate, drop, ids to rows, sort by user and
time, mark duplicates, leave-one-out split, write Parquet. Each side runs in a process of its own, so that
its peak memory is its own; they take turns."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, main, usable_cores

FULL, QUICK = 20_000_000, 1_000_000
REPEATS = 2  # turns each side takes
COLUMNS = ("user", "item", "time", "weight")


def bench(quick: bool) -> Iterator[Row]:
    """20 M rows (1 M with --quick) of a synthetic log, as CSV and as Parquet."""
    rows = QUICK if quick else FULL
    with tempfile.TemporaryDirectory(prefix="recray-bench-") as folder:
        make_log(Path(folder), rows)
        for kind in ("csv", "parquet"):
            yield from _compare(Path(folder), kind, rows)
        yield _unchanged(Path(folder), rows)


def make_log(folder: Path, rows: int, seed: int = 0) -> None:
    """log.csv and log.parquet: the same rows, Zipf-like items, ids as text, 1 % of rows invalid."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.csv as pcsv
    import pyarrow.parquet as pq

    rng = np.random.default_rng(seed)
    users, items = max(rows // 100, 10), max(rows // 400, 10)
    activity = rng.permutation(users)[(users * rng.random(rows) ** 1.5).astype(np.int64)]
    popular = rng.permutation(items)[(items * rng.random(rows) ** 3).astype(np.int64)]
    weight = rng.integers(1, 6, rows).astype(np.float64)
    weight[rng.random(rows) < 0.008] = -1  # cancelled
    user = pc.binary_join_element_wise("u", pa.array(activity).cast(pa.string()), "")
    user = pc.if_else(pa.array(rng.random(rows) < 0.002), "", user)  # missing
    item = pc.binary_join_element_wise("item-", pa.array(popular).cast(pa.string()), "")
    when = 1_600_000_000 + rng.integers(0, 4 * 365 * 86_400, rows)
    table = pa.table(dict(zip(COLUMNS, (user, item, pa.array(when), pa.array(weight)))))
    pcsv.write_csv(table, folder / "log.csv", pcsv.WriteOptions(quoting_style="none"))
    pq.write_table(table, folder / "log.parquet")


def ours(log: Path, out: Path) -> int:
    """Number of valid rows."""
    from recray.data.prepare import prepare

    return int(prepare(log, out=out).report["valid_rows"])


def in_pandas(log: Path, out: Path) -> int:
    """The same steps, the fastest way pandas has that keeps ids as they are written."""
    import numpy as np
    import pandas as pd

    if log.suffix == ".csv":
        types: Any = {"user": "str", "item": "str", "time": "int64", "weight": "float64"}
        df = pd.read_csv(log, dtype=types, engine="c", keep_default_na=False, na_values={"weight": [""]})
    else:
        df = pd.read_parquet(log)
    ok = (df.user != "") & (df.item != "") & df.user.notna() & df.item.notna()
    ok &= (df.user.str.len() <= 1024) & (df.item.str.len() <= 1024)
    ok &= np.isfinite(df.weight) & (df.weight > 0) & (df.time >= 0) & (df.time <= time.time() + 86_400)
    df = df[ok]
    user, users = pd.factorize(df.user)
    item, items = pd.factorize(df.item)
    df = pd.DataFrame(
        {
            "user_row": user.astype(np.int32),
            "item_row": item.astype(np.int32),
            "time": df.time.to_numpy(),
            "weight": df.weight.to_numpy(np.float32),
        }
    )
    df = df.sort_values(["user_row", "time"], kind="stable", ignore_index=True)
    df.duplicated(["user_row", "item_row", "time"]).sum()
    by_user = df.groupby("user_row", sort=False)
    from_end = by_user.cumcount(ascending=False)
    enough = by_user.user_row.transform("size") >= 3
    out.mkdir()
    test, valid = enough & (from_end == 0), enough & (from_end == 1)
    for name, chosen in (("train", ~(test | valid)), ("valid", valid), ("test", test)):
        df[chosen].to_parquet(out / f"{name}.parquet", index=False)
    pd.DataFrame({"id": users}).to_parquet(out / "users.parquet")
    pd.DataFrame({"id": items}).to_parquet(out / "items.parquet")
    return len(df)


def measure(side: str, log: str, out: str) -> dict[str, float]:
    """Seconds, peak resident bytes and valid rows of one side, in this process."""
    start = time.perf_counter()
    valid = {"recray": ours, "pandas": in_pandas}[side](Path(log), Path(out))
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_bytes": used.ru_maxrss * 1024, "valid": valid}


def _run(side: str, log: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="out-", dir=log.parent) as scratch:
        command = [sys.executable, "-m", "benchmarks.data", "--measure", side, str(log), f"{scratch}/out"]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def _compare(folder: Path, kind: str, rows: int) -> Iterator[Row]:
    log = folder / f"log.{kind}"
    found: dict[str, list[dict[str, float]]] = {"recray": [], "pandas": []}
    for _ in range(REPEATS):
        for side, runs in found.items():
            runs.append(_run(side, log))
    if found["recray"][0]["valid"] != found["pandas"][0]["valid"]:
        raise AssertionError(f"not the same work: {found}")
    speed = {side: [rows / run["seconds"] for run in runs] for side, runs in found.items()}
    peak = {side: max(run["peak_bytes"] for run in runs) for side, runs in found.items()}
    given = {
        "threads": usable_cores(),
        "repeats": REPEATS,
        "peak_gib": round(peak["recray"] / 2**30, 2),
        "peer_peak_gib": round(peak["pandas"] / 2**30, 2),
        "file_bytes": log.stat().st_size,
        "runs": {side: [round(run["seconds"], 2) for run in runs] for side, runs in found.items()},
        "cpu_seconds": {
            side: round(min(run["cpu_seconds"] for run in runs), 2) for side, runs in found.items()
        },
    }
    work = f"{rows // 10**6}M rows {kind}"
    yield Row(
        name=f"prepare {kind}", work=work, metric="rows/s", value=statistics.median(speed["recray"]),
        unit="rows/s", peer="pandas", peer_value=statistics.median(speed["pandas"]), given=given, seeds=[0],
    )  # fmt: skip
    yield Row(
        name=f"prepare {kind}, peak memory", work=work, metric="bytes", value=peak["recray"], unit="bytes",
        peer="pandas", peer_value=peak["pandas"], given={"limit_gib": 6, "repeats": REPEATS}, seeds=[0],
    )  # fmt: skip


def _unchanged(folder: Path, rows: int) -> Row:
    """Preparing the same log again: only its fingerprint is taken."""
    out = folder / "again"
    first = measure("recray", str(folder / "log.csv"), str(out))
    again = measure("recray", str(folder / "log.csv"), str(out))
    shutil.rmtree(out)
    return Row(
        name="prepare an unchanged input", work=f"{rows // 10**6}M rows csv", metric="seconds",
        value=again["seconds"], unit="s", ratio=first["seconds"] / again["seconds"],
        given={"first_seconds": round(first["seconds"], 3), "cores": os.cpu_count()}, seeds=[0],
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*sys.argv[2:5])))
        sys.exit(0)
    sys.exit(main("data", bench))
