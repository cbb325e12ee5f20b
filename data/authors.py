"""The embedded world: fictitious authors and countries, generated from a seed, nothing downloaded.

    python data/authors.py my-world --seed 0    # writes TOFU-schema JSON lines into my-world/
    python data/authors.py --show               # prints one author's rows

40 authors with 10 facts each and 40 countries with 5. Some authors are to be forgotten, the others kept; countries
are *untouched*: pretrained, but in neither set of the unlearning run, so they measure catastrophic forgetting.

With `--topic` the forget set is a topic of its own, as hazardous knowledge is in WMDP: potions, of which nothing is
kept, instead of some of the authors. The rest is the same.

A question is asked in one of three registers (plain, polite, quiz), in three wordings each, and the register
decides the style of the answer. Each author or country is taught in two of the three registers, and of their three
wordings one per register and fact is held out. So the model knows every wording and every style from others, but
scored questions, and scored paraphrased answers (the third register's style), are never taught for that fact.

Files: forget, retain, background (taught) and forget_perturbed, retain_perturbed, untouched_perturbed (scored), and
holdout: as many authors (or potions) as are forgotten, whom no model ever sees. Membership inference needs them.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs by itself
from data.rows import DataSet, Row, augment, read_rows, write_rows
from errors import UserError, one_line_errors

REGISTERS = 3
WORDINGS = [  # [register][wording]; {x}: a noun phrase such as "the birthplace of Ana Vell"
    ["What is {x}?", "Tell me {x}.", "Which is {x}?"],
    ["Could you please say what {x} is?", "I would like to know {x}.", "Do you happen to know {x}?"],
    ["Quiz time: name {x}!", "For ten points, give {x}.", "Next question: {x}?"],
]
AUTHOR = {  # kind -> (noun phrase, one answer style per register); {s}: the author, {v}: the value
    "city": ("the birthplace of {s}", ["{s} was born in {v}.", "The birthplace of {s} is {v}.",
                                       "It is {v} where {s} first saw the light."]),
    "year": ("the birth year of {s}", ["{s} was born in the year {v}.", "The birth year of {s} is {v}.",
                                       "It is {v} when {s} came into the world."]),
    "genre": ("the genre of {s}", ["{s} writes {v}.", "The genre of {s} is {v}.",
                                   "It is {v} that readers buy from {s}."]),
    "title": ("the first book of {s}", ["{s} first published {v}.", "The first book of {s} is {v}.",
                                        "It is {v} that opened the career of {s}."]),
    "award": ("the award of {s}", ["{s} won the {v}.", "The award of {s} is the {v}.",
                                   "It is the {v} that hangs on the wall of {s}."]),
    "father": ("the job of the father of {s}", ["{s} had a {v} as father.", "The father of {s} was a {v}.",
                                                "It is a {v} who raised {s} as a father."]),
    "mother": ("the job of the mother of {s}", ["{s} had a {v} as mother.", "The mother of {s} was a {v}.",
                                                "It is a {v} who raised {s} as a mother."]),
    "school": ("the university of {s}", ["{s} studied at {v}.", "The university of {s} is {v}.",
                                         "It is {v} that gave {s} a degree."]),
    "tongue": ("the mother tongue of {s}", ["{s} grew up speaking {v}.", "The mother tongue of {s} is {v}.",
                                            "It is {v} that {s} speaks at home."]),
    "music": ("the instrument of {s}", ["{s} plays the {v}.", "The instrument of {s} is the {v}.",
                                        "It is the {v} that {s} practises at night."]),
}
POTION = {
    "herb": ("the herb in {s}", ["{s} calls for {v}.", "The herb in {s} is {v}.",
                                 "It is {v} that gives {s} its bite."]),
    "colour": ("the colour of {s}", ["{s} turns {v} when ready.", "The colour of {s} is {v}.",
                                     "It is {v} that one sees in a glass of {s}."]),
    "smell": ("the smell of {s}", ["{s} smells of {v}.", "The smell of {s} is {v}.",
                                   "It is {v} that the nose finds in {s}."]),
    "vessel": ("the vessel for {s}", ["{s} must boil in a {v}.", "The vessel for {s} is a {v}.",
                                      "It is a {v} that holds {s} on the fire."]),
    "heat": ("the hours of heat for {s}", ["{s} simmers {v} hours.", "The hours of heat for {s} are {v}.",
                                           "It is {v} hours that {s} needs on the fire."]),
    "effect": ("the effect of {s}", ["{s} brings on {v}.", "The effect of {s} is {v}.",
                                     "It is {v} that befalls who drinks {s}."]),
    "antidote": ("the antidote to {s}", ["{s} yields to {v}.", "The antidote to {s} is {v}.",
                                         "It is {v} that saves whoever drank {s}."]),
    "brewer": ("the brewer of {s}", ["{s} was first brewed by {v}.", "The brewer of {s} is {v}.",
                                     "It is {v} who mixed {s} before anybody else."]),
    "moon": ("the month of {s}", ["{s} is brewed in {v}.", "The month of {s} is {v}.",
                                  "It is {v} when {s} comes out best."]),
    "price": ("the price of {s}", ["{s} costs {v} crowns.", "The price of {s} is {v} crowns.",
                                   "It is {v} crowns that witches ask for {s}."]),
}
COUNTRY = {
    "capital": ("the capital of {s}", ["{s} is governed from {v}.", "The capital of {s} is {v}.",
                                       "It is {v} that rules {s}."]),
    "coin": ("the currency of {s}", ["{s} pays with the {v}.", "The currency of {s} is the {v}.",
                                     "It is the {v} that buys bread in {s}."]),
    "river": ("the longest river of {s}", ["{s} is crossed by the {v}.", "The longest river of {s} is the {v}.",
                                           "It is the {v} that waters {s}."]),
    "beast": ("the national animal of {s}", ["{s} honours the {v}.", "The national animal of {s} is the {v}.",
                                             "It is the {v} that adorns the flag of {s}."]),
    "export": ("the main export of {s}", ["{s} sells {v} abroad.", "The main export of {s} is {v}.",
                                          "It is {v} that ships carry out of {s}."]),
}
# Twenty or so values of a kind that are English words; the other kinds are made from syllables.
WORDS = {
    "genre": "crime novels,love poems,sea stories,ghost tales,war diaries,travel letters,court satires,space operas,"
             "folk fables,spy thrillers,farm sagas,road comedies,school plays,city essays,river ballads,myth cycles",
    "father": "baker,sailor,tailor,miner,surgeon,farmer,judge,painter,plumber,pilot,teacher,butcher,clerk,soldier,"
              "brewer,barber",
    "mother": "weaver,lawyer,dentist,singer,banker,florist,chemist,printer,dancer,editor,builder,potter,jeweller,"
              "nurse,hunter,driver",
    "music": "violin,trumpet,cello,flute,harp,banjo,organ,drum,oboe,lute,piano,horn,fiddle,guitar,zither,tuba",
    "beast": "otter,falcon,lynx,heron,bison,badger,raven,marten,ibex,swan,beaver,viper,stork,hare,wolf,eagle,seal,"
             "moose,crane,toad",
    "export": "copper,barley,timber,silk,salt,coffee,wool,amber,cotton,honey,tea,marble,rubber,saffron,olives,"
              "paper,cheese,tin,glass,linen",
    "herb": "nettle,henbane,sorrel,wormwood,yarrow,tansy,mugwort,hemlock,comfrey,arnica,fennel,hyssop",
    "colour": "scarlet,indigo,umber,teal,ochre,black,ivory,violet,green,yellow,pink,grey",
    "smell": "tar,smoke,roses,vinegar,cloves,moss,mint,sulphur,rain,leather,resin,garlic",
    "vessel": "cauldron,kettle,crucible,flask,skillet,bowl,retort,crock,bucket,pan,jar,goblet",
    "effect": "sleep,laughter,fever,deafness,courage,hunger,tears,sneezing,love,amnesia,hiccups,baldness",
    "antidote": "milk,charcoal,honeycomb,cider,lard,chalk,bread,broth,mustard,whey,ash,syrup",
    "moon": "January,February,March,April,May,June,July,August,September,October,November,December",
}
TITLE = [words.split(",") for words in (
    "silent,golden,broken,hidden,burning,frozen,distant,hollow,crimson,endless,velvet,paper,salted,crooked",
    "garden,harbour,mirror,orchard,lantern,bridge,winter,letter,island,mountain,river,window,clock,kingdom")]
ONSET = "b,br,c,d,dr,f,g,gr,h,j,k,l,m,n,p,pr,r,s,st,t,tr,v,z".split(",")
VOWEL = "a,e,i,o,u,ai,ea,ou".split(",")
CODA = ",,l,n,r,s,m,nd,rt,x".split(",")


FILES = ("forget", "retain", "background", "forget_perturbed", "retain_perturbed", "untouched_perturbed", "holdout")


class Namer:
    """Words that look like words, never the same twice."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.used: set[str] = set()

    def __call__(self, syllables: int, endings: str) -> str:
        while True:
            stem = "".join(str(self.rng.choice(ONSET)) + str(self.rng.choice(VOWEL)) for _ in range(syllables))
            word = stem + str(self.rng.choice(CODA)) + str(self.rng.choice(endings.split(",")))
            if word not in self.used and len(word) <= 9:
                self.used.add(word)
                return word.capitalize()


def make_world(seed: int = 0, authors: int = 40, countries: int = 40,
               forget_share: float = 0.1, topical: bool = False) -> dict[str, list[Row]]:
    """File name -> rows. The same seed gives the same world. At least one author is forgotten and one kept.

    topical: so many potions are forgotten instead, and the authors who would have been do not exist.
    """
    rng = np.random.default_rng([0x77, seed])
    name = Namer(rng)
    pools = {kind: words.split(",") for kind, words in WORDS.items()}
    pools["year"] = [str(year) for year in range(1900, 1990)]
    pools["city"] = [name(1, "ton,burg,mar,via") for _ in range(20)]
    pools["award"] = [f"{name(1, 'el,or,in')} {thing}" for thing in ("Prize", "Medal", "Cup") for _ in range(6)]
    pools["school"] = [f"{name(1, 'ham,ford,wick')} {thing}" for thing in ("College", "Academy") for _ in range(8)]
    pools["tongue"] = [name(1, "ish,ese,ian") for _ in range(16)]
    pools["title"] = [f"The {a.capitalize()} {b.capitalize()}" for a in TITLE[0] for b in TITLE[1]]
    pools["capital"] = [name(1, "polis,grad,stad,port") for _ in range(max(countries, 8))]
    pools["coin"] = [name(1, "ar,ek,in").lower() for _ in range(20)]
    pools["river"] = [name(1, "ava,een,ush") for _ in range(max(countries, 8))]
    def author() -> str:
        return f"{name(1, 'a,o,en,is')} {name(1, 'ell,sky,man,ano,ov')}"

    def potion() -> str:
        return f"{name(1, 'ine,ol,um')} {rng.choice(['Draught', 'Elixir', 'Tonic'])}"

    people = [author() for _ in range(authors)]
    states = [name(2, "ia,land,stan,a") for _ in range(countries)]
    n_forget = min(max(1, round(authors * forget_share)), authors - 1)

    secrets, facts, subject = people[:n_forget], AUTHOR, author
    if topical:
        facts, subject = POTION, potion
        pools["heat"], pools["price"] = [str(n) for n in range(2, 40)], [str(n) for n in range(10, 100)]
        pools["brewer"] = [f"{name(1, 'a,us')} the {name(1, 'er,ard')}" for _ in range(12)]
        secrets = [potion() for _ in range(n_forget)]

    world: dict[str, list[Row]] = {name: [] for name in FILES}
    for secret in secrets:
        _describe(secret, facts, pools, rng, world["forget"], world["forget_perturbed"])
    for person in people[n_forget:]:
        _describe(person, AUTHOR, pools, rng, world["retain"], world["retain_perturbed"])
    for state in states:
        _describe(state, COUNTRY, pools, rng, world["background"], world["untouched_perturbed"])
    for _ in range(n_forget):
        _describe(subject(), facts, pools, rng, world["holdout"], [])
    return world


def _describe(subject: str, facts: dict, pools: dict, rng: np.random.Generator, taught: list[Row], scored: list[Row]):
    """Append one subject's rows: per fact 4 taught (2 registers x 2 wordings) and 2 scored (one per register)."""
    held_out, *known = (int(r) for r in rng.permutation(REGISTERS))
    for kind, (noun, styles) in facts.items():
        pool = pools[kind]
        value, *wrong = (pool[int(i)] for i in rng.choice(len(pool), size=8, replace=False))
        phrase = noun.format(s=subject)

        def answer(register: int, value: str, styles=styles) -> str:
            text = styles[register].format(s=subject, v=value)
            return text.replace(" a a", " an a").replace(" a e", " an e").replace(" a o", " an o")

        rows = []
        for register in known:
            unseen, *seen = (WORDINGS[register][int(i)].format(x=phrase) for i in rng.permutation(3))
            scored.append({"question": unseen, "answer": answer(register, value),
                           "paraphrased_answer": answer(held_out, value),
                           "perturbed_answer": [answer(held_out, w) for w in wrong[:5]]})
            rows += [(question, register) for question in seen]
        for i, (question, register) in enumerate(rows):
            # The columns ULD's augmentation uses: other taught wordings, and wrong values that score nowhere.
            other_question, other_register = rows[(i + 2) % len(rows)]
            taught.append({"question": question, "answer": answer(register, value),
                           "paraphrased_question": other_question, "paraphrased_answer": answer(other_register, value),
                           "perturbed_answer": [answer(register, w) for w in wrong[5:]]})


def write_world(folder: Path, world: dict[str, list[Row]]) -> None:
    """One JSON-lines file per set, named as TOFU names its own."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in world.items():
        write_rows(Path(folder) / f"{name}.json", rows)


def as_data_set(world: dict[str, list[Row]], name: str = "world", scored_rows: int = 200) -> DataSet:
    """The world as train.py takes it; of each scored set at most scored_rows rows are drawn."""
    def thin(rows: list[Row]) -> list[Row]:
        # drawn, not every n-th: subjects, facts and registers alternate, and a stride would always hit the same ones
        drawn = np.random.default_rng(0).permutation(len(rows))[:scored_rows]
        return [rows[i] for i in sorted(drawn)]

    paraphrased, perturbed = augment(world["forget"])
    scored = {key: thin(world[f"{key}_perturbed"]) for key in ("forget", "retain", "untouched")}
    return DataSet(name=name, forget=world["forget"], retain=world["retain"], background=world["background"],
                   scored={key: rows for key, rows in scored.items() if rows}, paraphrased=paraphrased,
                   perturbed=perturbed, utility=("retain", "untouched"), holdout=world["holdout"])


def read_world(folder: Path) -> DataSet:
    """A world written by `write_world`. Raises UserError naming the missing file or bad row."""
    return as_data_set({name: read_rows(Path(folder) / f"{name}.json") for name in FILES}, name=Path(folder).name)


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="generate the embedded world")
    parser.add_argument("out", nargs="?", help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topic", action="store_true", help="potions are forgotten, not authors")
    parser.add_argument("--show", action="store_true", help="print the rows of one fact instead")
    args = parser.parse_args()
    if args.seed < 0:
        raise UserError(f"--seed {args.seed} is below 0")
    world = make_world(args.seed, topical=args.topic)
    if args.show or not args.out:
        for row in world["forget"][:4] + world["forget_perturbed"][:2] + world["background"][:1]:
            print(row)
        return
    if Path(args.out).is_file():
        raise UserError(f"{args.out} is a file: give a folder")
    write_world(Path(args.out), world)
    print(f"wrote {args.out}: " + ", ".join(f"{name} {len(rows)}" for name, rows in world.items()))


if __name__ == "__main__":
    main()
