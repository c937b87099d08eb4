"""Recipes with the settings of one real set, `MODEL@SET`: each repeats a row of the quality table.

`recray train DATASET --recipe ease@lightgcn_gowalla`. Settings were chosen on validation splits alone; the
modules of `benchmarks/` tell how, and what else was tried. They are good first guesses for data of that kind.
"""

from __future__ import annotations

_LABELS = (
    "options.loss=labels",
    "options.history=off",
    "options.dim=16",
    "options.hidden=400,400,400",
    "options.norm=pair",
    "options.init=0.01",
    "options.dropout=0.2",
    "options.unknown=0",
    "train.batch_size=4096",
    "train.table_l2=0.07",
    "train.schedule=cosine",
    "train.epochs=20",
)
TUNED: dict[str, tuple[str, tuple[str, ...]]] = {  # name -> (recipe, changes)
    # MovieLens-1M as NCF splits it: 1.0 M interactions, no order
    "ials@ml1m_ncf": (
        "ials",
        ("options.dim=192", "options.reg=0.007", "options.unobserved=0.3", "options.sweeps=16"),
    ),
    "neumf@ml1m_ncf": (
        "neumf",
        (
            "options.dim=128",
            "options.dropout=0.3",
            "options.history=half",
            "options.max_len=3000",
            "options.negatives=4000",  # all items
            "options.pretrain=35",
            "train.batch_size=64",
            "train.lr=0.003",
            "train.schedule=cosine",
            "train.epochs=42",
            "train.patience=0",
            "train.valid_users=1000",
        ),
    ),
    # MovieLens-1M in order: 166 a user
    "sasrec@ml1m": ("sasrec", ("train.batch_size=128", "train.epochs=60", "train.patience=5")),
    "dcn@ml1m": ("dcn", ("train.batch_size=64",)),
    # Amazon Beauty in order: 12 k items, 9 a user
    "sasrec@s3rec_beauty": ("sasrec", ("train.batch_size=128", "options.dropout=0.4", "train.patience=4")),
    "esasrec@s3rec_beauty": (
        "esasrec",
        ("train.batch_size=128", "options.dropout=0.4", "options.negatives=1024", "train.epochs=40"),
    ),
    "mind@s3rec_beauty": (
        "mind",
        ("train.batch_size=128", "options.loss=sampled", "options.negatives=1024"),
    ),
    "dcn@s3rec_beauty": ("dcn", ("train.batch_size=64",)),
    # Gowalla as LightGCN splits it: 41 k places, 27 a user, no order
    "item-knn@lightgcn_gowalla": (
        "item-knn",
        ("options.weighting=unit", "options.alpha=0.7", "options.shrink=0", "options.neighbours=500"),
    ),
    "user-knn@lightgcn_gowalla": ("user-knn", ("options.neighbours=200",)),
    "spectral@lightgcn_gowalla": ("spectral", ("options.dim=512",)),
    "ials@lightgcn_gowalla": (
        "ials",
        ("options.dim=256", "options.unobserved=0.02", "options.reg=0.003", "options.sweeps=12"),
    ),
    "bpr@lightgcn_gowalla": (
        "bpr",
        ("options.dim=128", "options.epochs=60", "options.draws=16", "options.reg=0.02"),
    ),
    "two-tower@lightgcn_gowalla": (
        "two-tower",
        (
            "options.dim=192",
            "options.dropout=0.45",
            "options.history=half",
            "options.max_len=2000",
            "options.negatives=41000",  # all items
            "options.pooling=mean",
            "options.temperature=0.07",
            "train.batch_size=256",
            "train.lr=0.001",
            "train.table_lr=0.01",
            "train.metric=recall@20",
            "train.schedule=cosine",
            "train.epochs=9",
            "train.patience=0",
        ),
    ),
    "ease@lightgcn_gowalla": ("ease", ("options.reg=100", "options.neighbours=400")),
    # frappe: labelled rows, nine contexts, no history
    "dlrm@frappe": (
        "dlrm",
        (*_LABELS, "options.interaction=cat"),
    ),
    "dcn@frappe": (
        "dcn",
        _LABELS,
    ),
    # Amazon Scientific: 4 k items with text, 7 a user
    "content@scientific_text": ("content", ("options.dim=512", "options.decay=0.6")),
}
