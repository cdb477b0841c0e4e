"""Class names that data sets do not bring along, and other names of theirs that would give a class away."""

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# The fine classes of CIFAR-100 by number (Krizhevsky 2009); files that name theirs are believed instead.
_CIFAR100 = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
CIFAR100 = tuple(_CIFAR100.split())

ALIASES: dict[str, tuple[str, ...]] = {
    **{name: (str(number),) for number, name in enumerate(DIGITS)},
    "aquarium fish": ("goldfish",),
    "bicycle": ("bike",),
    "cattle": ("cow", "bull"),
    "chimpanzee": ("chimp",),
    "cockroach": ("roach",),
    "couch": ("sofa",),
    "crocodile": ("alligator",),
    "lawn mower": ("mower",),
    "motorcycle": ("motorbike",),
    "pickup truck": ("pickup",),
    "possum": ("opossum",),
    "rabbit": ("bunny",),
    "streetcar": ("tram",),
    "sweet pepper": ("bell pepper", "capsicum"),
    "telephone": ("phone",),
    "television": ("tv",),
    "turtle": ("tortoise",),
    "donuts": ("doughnuts",),
    "french fries": ("fries", "chips"),
    "hamburger": ("burger",),
    "ice cream": ("gelato",),
    "macaroni and cheese": ("mac and cheese",),
}
