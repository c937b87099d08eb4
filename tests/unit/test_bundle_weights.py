"""Histories keep their weights from the dataset to the answer, whichever way is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

import recray
from recray.serving import stages


def test_known_users_are_answered_by_the_weights_that_models_are_measured_with(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    lines = [
        f"u{user},i{item},{draw.integers(1, 6)},{n}\n"
        for user in range(60)
        for n, item in enumerate(draw.permutation(40)[:12])
    ]
    (tmp_path / "log.csv").write_text("user,item,rating,time\n" + "".join(lines))
    data = recray.prepare(tmp_path / "log.csv", split="none", out=tmp_path / "data")
    made = recray.train(data, recipe="user-knn", set=["options.weighted=true"], out=tmp_path / "model")
    bundle = recray.bundle(made, data=data, out=tmp_path / "bundle")
    histories = data.histories("train")
    wanted = bundle.recommender.recommend(histories, 5, exclude=histories).rows
    plain = dataclasses.replace(histories, weights=None)
    assert (bundle.recommender.recommend(plain, 5, exclude=histories).rows != wanted).any()
    users = [data.users.id_of(row) for row in range(60)]
    alone = [[item.item for item in bundle.recommend(user=user, k=5).items] for user in users]
    assert alone == [data.items.ids_of(rows) for rows in wanted]
    requests = [bundle.request(user=user, k=5) for user in users]
    found = stages.retrieve(bundle, stages.to_retrieve(requests, 0))
    assert found.rows[:, :5].tolist() == wanted.tolist()
    recray.recommend(bundle, users=users, k=5, out=tmp_path / "many")
    many = pq.read_table(tmp_path / "many" / "recommendations.parquet").column("item").to_pylist()
    assert many == [item for items in alone for item in items]
