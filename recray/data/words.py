"""Words that the synthetic world's items are named with."""

from __future__ import annotations

CATEGORIES: dict[str, tuple[str, ...]] = {  # department/category -> what its items are called
    "kitchen/cookware": ("saucepan", "skillet", "stockpot", "wok", "griddle", "casserole"),
    "kitchen/coffee": ("grinder", "kettle", "espresso cup", "moka pot", "milk frother", "coffee filter"),
    "kitchen/baking": ("cake tin", "whisk", "rolling pin", "proofing basket", "piping bag", "loaf pan"),
    "kitchen/table": ("dinner plate", "bowl", "carafe", "napkin ring", "serving tray", "tumbler"),
    "garden/plants": ("fern", "succulent", "orchid", "ivy", "lavender", "bonsai"),
    "garden/tools": ("trowel", "pruner", "watering can", "rake", "hoe", "hose reel"),
    "garden/furniture": ("bench", "hammock", "parasol", "deck chair", "fire bowl", "side table"),
    "garden/birds": ("nest box", "seed feeder", "bird bath", "suet ball", "perch", "hide"),
    "sport/running": ("trail shoe", "running vest", "headlamp", "stopwatch", "ankle sock", "soft flask"),
    "sport/cycling": ("saddle", "bike pump", "pannier", "handlebar tape", "helmet", "chain lube"),
    "sport/climbing": ("harness", "chalk bag", "carabiner", "rope", "belay device", "crash pad"),
    "sport/swimming": ("goggles", "swim cap", "kickboard", "nose clip", "pull buoy", "towel"),
    "media/novels": ("thriller", "romance", "saga", "mystery", "fable", "novella"),
    "media/games": ("card game", "puzzle", "strategy game", "dice set", "party game", "quiz box"),
    "media/music": ("vinyl record", "songbook", "tuner", "metronome", "guitar strap", "drumsticks"),
    "media/film": ("box set", "documentary", "film poster", "soundtrack", "director's cut", "screenplay"),
    "home/light": ("desk lamp", "lantern", "night light", "pendant", "candle", "light chain"),
    "home/textiles": ("throw", "cushion", "curtain", "rug", "duvet cover", "bath mat"),
    "home/storage": ("crate", "shelf", "drawer box", "coat rack", "basket", "shoe rack"),
    "home/decor": ("vase", "picture frame", "wall clock", "mirror", "figurine", "wreath"),
    "craft/yarn": (
        "wool skein",
        "knitting needle",
        "crochet hook",
        "stitch marker",
        "yarn bowl",
        "darning egg",
    ),
    "craft/paint": ("watercolour set", "easel", "flat brush", "palette", "canvas", "varnish"),
    "craft/paper": ("fountain pen", "notebook", "wax seal", "washi tape", "bone folder", "ink bottle"),
    "craft/wood": ("spokeshave", "mallet", "carving knife", "clamp", "marking gauge", "wood oil"),
}
ADJECTIVES = (
    "compact", "classic", "sturdy", "slim", "quiet", "bright", "folding", "handmade", "light", "deep",
    "matte", "rounded", "travel", "everyday", "vintage", "refined",
)  # fmt: skip
_OPENINGS = ("Au", "Bel", "Cor", "Dal", "El", "Fen", "Gal", "Hol", "Is", "Jun", "Kal", "Lum", "Mar", "Nor")
_ENDINGS = ("ora", "dane", "vik", "essa", "mont", "aro", "isle", "une", "ette", "ano", "wyn", "heim", "ira")


def collection(number: int) -> str:
    """A made-up name for each number: Auora, Beldane ..., with a numeral once they run out."""
    names = len(_OPENINGS) * len(_ENDINGS)
    name = _OPENINGS[number % len(_OPENINGS)] + _ENDINGS[number // len(_OPENINGS) % len(_ENDINGS)]
    return name if number < names else f"{name} {number // names + 1}"


def title(collection_number: int, adjective: int, category: str, noun: int) -> str:
    """'Lumessa compact saucepan': the collection, an adjective, what it is."""
    nouns = CATEGORIES[category]
    what = f"{ADJECTIVES[adjective % len(ADJECTIVES)]} {nouns[noun % len(nouns)]}"
    return f"{collection(collection_number)} {what}"
