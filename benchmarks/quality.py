"""Quality on real logs: each model by a recipe's name, beside its peers on the same split. The works:

ml1m_ncf          HR@10 and NDCG@10 of one held-out item among 99 given negatives (He et al. 2017)
ml1m, s3rec_beauty   sequences, leave-one-out, full ranking
lightgcn_gowalla  Recall@20 and NDCG@20, full ranking
scientific_text   content alone beside popularity
frappe            AUC of labelled rows
ratings           RMSE and MAE on MovieLens-100K
ml100k            recipes as they come, leave-one-out, full ranking
two_stages        a ranker behind a retriever, beside the retriever alone
interests         MIND beside its own one-interest version
adversarial       models trained under attack beside plain ones, attacked

A work is what --work takes; --only WORD leaves all recipes out whose name does not hold the word. The rows
that are kept lie in results/quality_*.json, one file a work. The sets lie in ../shared/data or $RECRAY_DATA;
one that is absent gives no rows.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks._sets import there
from benchmarks.rows import Row, main

WORKS = {  # name -> module:function, of (scratch folder, quick, only)
    "ml1m_ncf": "benchmarks._ncf:ncf_rows",
    "ml100k": "benchmarks._shelf:shelf_rows",
    "lightgcn_gowalla": "benchmarks._gowalla:gowalla_rows",
    "s3rec_beauty": "benchmarks._sequences:beauty_rows",
    "ml1m": "benchmarks._sequences:ml1m_rows",
    "scientific_text": "benchmarks._scientific:scientific_rows",
    "frappe": "benchmarks._frappe:frappe_rows",
    "ratings": "benchmarks._ratings:ratings_rows",
    "two_stages": "benchmarks._two_stages:two_stage_rows",
    "interests": "benchmarks._interests:interest_rows",
    "adversarial": "benchmarks._adversarial:adversarial_rows",
}
NEEDS = {  # a work whose set has another name
    **dict.fromkeys(("ratings", "two_stages", "adversarial"), "ml100k"),
    "interests": "",
}


def bench(quick: bool, work: str | None = None, only: str = "") -> Iterator[Row]:
    """Quality on real logs; --quick takes the fast models, one seed, and two epochs."""
    for name, target in WORKS.items():
        needed = NEEDS.get(name, name)
        if work in (None, name) and (not needed or there(needed)):
            module, _, function = target.partition(":")
            rows = getattr(importlib.import_module(module), function)
            with tempfile.TemporaryDirectory(prefix="recray-bench-") as scratch:
                yield from rows(Path(scratch), quick, only)


if __name__ == "__main__":
    sys.exit(main("quality", bench, works=tuple(WORKS), choose=True))
