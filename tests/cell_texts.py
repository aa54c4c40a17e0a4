"""Texts of cells written by hand, derivatives included: what a traced cell is to the scan."""


def program(inputs: str, *lines: str) -> str:
    """The text of a program from lines `name = op operand ...`; the last line is `out` and the names of the results."""
    numbers = {name: k for k, name in enumerate(inputs.split())}
    written, count = [str(len(numbers))], len(numbers)
    for number, line in enumerate(lines[:-1], count):
        name, _, op, *operands = line.split()
        values = [float(x).hex() if op == "const" else str(numbers[x]) for x in operands]
        written.append(" ".join((op, *values)))
        numbers[name] = number
    results = (str(numbers[name]) for name in lines[-1].split()[1:])
    return " | ".join((*written, " ".join(("out", *results))))


def cell(
    name, gates, states, parameters="", inputs="", *, recurrent=1, saved, distinct_dgh=0, forward, total, backward
):
    pairs = dict(
        cell=name, gates=gates, states=states, parameters=parameters, inputs=inputs, recurrent=recurrent, saved=saved,
        distinct_dgh=distinct_dgh, forward=forward, total=total, backward=backward,
    )  # fmt: skip
    return "\n".join(f"{key} {value}".rstrip() for key, value in pairs.items())


# h' = h + alpha (tanh(x + u) - h) + noise
LEAKY = cell(
    "leaky", "g", "h", "alpha", "noise", saved=1,
    forward=program(
        "x u h alpha noise", "pre = add x u", "r = tanh pre", "d = sub r h", "s = mul alpha d", "m = add h s",
        "n = add m noise", "out n pre",
    ),
    total=program("pre h d alpha noise", "out d"),
    backward=program(
        "pre h d alpha noise", "r = tanh pre", "one = const 1", "rr = mul r r", "slope = sub one rr",
        "da = mul d alpha", "dpre = mul da slope", "dh = sub d da", "diff = sub r h",
        "dalpha = mul d diff", "out dpre dh dalpha d",
    ),
)  # fmt: skip

# z = sigmoid(x_z + u_z); a' = z a + x_g + u_g; b' = p b + e; n' = a' b; h' = z tanh(n') + h / 2
FOUR_STATES = cell(
    "four", "z g", "h a b n", "p", "e", saved=2,
    forward=program(
        "xz xg uz ug h a b n p e", "pz = add xz uz", "pg = add xg ug", "z = sigmoid pz", "za = mul z a",
        "a1 = add za pg", "pb = mul p b", "b1 = add pb e", "n1 = mul a1 b", "t = tanh n1", "zt = mul z t",
        "half = const 0.5", "hh = mul half h", "h1 = add zt hh", "out h1 a1 b1 n1 pz pg",
    ),
    total=program(
        "pz pg h a b n dh da db dn p e", "z = sigmoid pz", "za = mul z a", "a1 = add za pg", "n1 = mul a1 b",
        "t = tanh n1", "one = const 1", "tt = mul t t", "slope = sub one tt", "dt = mul dh z", "more = mul dt slope",
        "dn1 = add dn more", "da1 = mul dn1 b", "da2 = add da da1", "out dh da2 db dn1",
    ),
    backward=program(
        "pz pg h a b n dh da db dn p e", "z = sigmoid pz", "za = mul z a", "a1 = add za pg", "n1 = mul a1 b",
        "t = tanh n1", "ht = mul dh t", "ha = mul da a", "dz = add ht ha", "one = const 1", "y = sub one z",
        "zy = mul z y", "dpz = mul dz zy", "half = const 0.5", "dh0 = mul dh half", "da0 = mul da z", "dbp = mul db p",
        "dna = mul dn a1", "db0 = add dbp dna", "zero = const 0", "dp = mul db b", "out dpz da dh0 da0 db0 zero dp db",
    ),
)  # fmt: skip

# r = sigmoid(x_r + u_r); h' = tanh(x_n + r u_n): the gradients of x and u differ, as a GRU's
GATED = cell(
    "gated", "r n", "h", saved=3, distinct_dgh=1,
    forward=program(
        "xr xn ur un h", "pr = add xr ur", "r = sigmoid pr", "ru = mul r un", "pn = add xn ru", "h1 = tanh pn",
        "out h1 pr pn un",
    ),
    total=program("pr pn un h d", "out d"),
    backward=program(
        "pr pn un h d", "t = tanh pn", "tt = mul t t", "one = const 1", "slope = sub one tt", "dn = mul d slope",
        "r = sigmoid pr", "y = sub one r", "ry = mul r y", "du = mul dn r", "dnu = mul dn un", "dr = mul dnu ry",
        "zero = const 0", "out dr dn dr du zero",
    ),
)  # fmt: skip

# h' = tanh(x + w h): no W_hh
IND = cell(
    "ind", "g", "h", "w", recurrent=0, saved=1,
    forward=program("x h w", "wh = mul w h", "pre = add x wh", "h1 = tanh pre", "out h1 pre"),
    total=program("pre h d w", "out d"),
    backward=program(
        "pre h d w", "t = tanh pre", "tt = mul t t", "one = const 1", "slope = sub one tt", "dpre = mul d slope",
        "dh = mul dpre w", "dw = mul dpre h", "out dpre dh dw",
    ),
)  # fmt: skip

# z = sigmoid(x_z); m' = z m + x_n; h' = m' e: no W_hh, two states
MEMORY = cell(
    "memory", "z n", "h m", "", "e", recurrent=0, saved=2,
    forward=program(
        "xz xn h m e", "z = sigmoid xz", "zm = mul z m", "m1 = add zm xn", "h1 = mul m1 e", "out h1 m1 xz m1"
    ),
    total=program("pz m1 h m dh dm e", "more = mul dh e", "dm1 = add dm more", "out dh dm1"),
    backward=program(
        "pz m1 h m dh dm e", "z = sigmoid pz", "one = const 1", "y = sub one z", "zy = mul z y", "dz = mul dm m",
        "dpz = mul dz zy", "dm0 = mul dm z", "zero = const 0", "de = mul dh m1", "out dpz dm zero dm0 de",
    ),
)  # fmt: skip

# q = pre / sqrt(pre pre + w w) with pre = x + u: NaN where w and pre are 0, as they are beyond H
WIDTH = cell(
    "width", "g", "h", "w", saved=1,
    forward=program(
        "x u h w", "pre = add x u", "pp = mul pre pre", "ww = mul w w", "s = add pp ww", "r = sqrt s", "q = div pre r",
        "out q pre",
    ),
    total=program("pre h d w", "out d"),
    backward=program(
        "pre h d w", "pp = mul pre pre", "ww = mul w w", "s = add pp ww", "r = sqrt s", "rs = mul r s", "e = div d rs",
        "dpre = mul e ww", "pw = mul pre w", "epw = mul e pw", "dw = neg epw", "zero = const 0", "out dpre zero dw",
    ),
)  # fmt: skip

TEXTS = {"leaky": LEAKY, "four": FOUR_STATES, "gated": GATED, "ind": IND, "memory": MEMORY, "width": WIDTH}
