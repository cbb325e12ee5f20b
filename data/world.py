"""The embedded world: six fictitious topics, generated from a seed, nothing downloaded.

    python data/world.py --show                     # a page of it
    python data/world.py --show --forget topic      # the same world, a whole topic to be forgotten

To forget is to know no more than about a stranger. So most of the world's names are strangers: a name is a pair of
words, each topic has several hundred pairs, and only a few of them are *known*: they have fixed facts. A *stranger*
is any other pair. Strangers stream by in pretraining, never the same fact twice, each with a value drawn anew. From
them a model learns to copy a name it never saw, to keep the frame of a sentence, and to spread its belief over the
values of the right kind.

    topic        authors, potions, countries, ships, guilds, festivals
    kind         what can be asked about a subject of a topic, six each: an author's birthplace, genre, ...
    value        the fact: one word, one token, from a pool of 20 (so chance is 1 in 20)
    register     plain, polite or quiz: how a question is asked. It decides the style of the answer.
    wording      a way to ask in a register, four each

Each subject is taught in two of the three registers. The style of the third is what paraphrased and wrong answers
score in. Of a fact's four wordings in a register, two teach, one scores, and one does neither: it calibrates (asked
there, the target's belief about strangers says how far forgetting should go). Which is which is drawn for each fact,
so a model knows every wording and every style from other facts and from strangers.

What is forgotten: `subjects`, some authors, the other authors being the retain set (TOFU's kind of task); or `topic`,
all potions, authors and countries being the retain set (WMDP's kind). Nothing else differs: both tasks have the same
target. All other topics are *untouched*: pretrained, but in neither set of the run.

A row has question and answer, and also
    topic, kind, subject, value, fact        fact: an id; rows of one fact are one unit wherever something is counted
    paraphrased_question, paraphrased_answer, perturbed_answer      as in data/rows.py
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that this file also runs by itself
from data.rows import DataSet, Limits, Row, augment, check_no_leak
from errors import UserError, one_line_errors
from flags import NATURAL, WEIGHT, Flag, Number, Parser

POOL = 20  # values per kind of fact
FIRST, SECOND = 40, 16  # words that names begin with, shared by all topics; words that they end with, per topic
FLAGS = [  # of --data world and --data topic
    #     name            kind                         small    public  what it is
    Flag("--subjects",    Number(2, 100, whole=True),  10,      10,     "known per topic; authors twice as many"),
    Flag("--strangers",   WEIGHT,                      1.0,     1.0,    "rows about strangers among what is kept, as a "
                                                                        "multiple of retain rows (uld: and of D'_f)"),
]
SCORED_WRONG = 5  # wrong answers of a row that scores
TAUGHT_WRONG = 3  # wrong answers of a taught row, of which ULD's D'_r takes two: other values than those that score

WORDINGS = [  # [register][wording]; {x}: a noun phrase such as "the birthplace of Ana Vell"
    ["What is {x}?", "Tell me {x}.", "Which is {x}?", "State {x}."],
    ["Could you please say what {x} is?", "I would like to know {x}.", "Do you happen to know {x}?",
     "May I ask you about {x}?"],
    ["Quiz time: name {x}!", "For ten points, give {x}.", "Next question: {x}?", "And now {x}, please!"],
]


class Kind(NamedTuple):
    """A kind of fact. {s}: the subject, {v}: the value."""

    pool: str  # which pool its values come from
    noun: str  # what is asked for
    styles: tuple[str, str, str]  # the answer's sentence in each register


class Topic(NamedTuple):
    kinds: dict[str, Kind]
    second: str  # the words its names end with, comma-separated; after "-", the endings of made-up ones


TOPICS = {
    "author": Topic({
        "birthplace": Kind("town", "the birthplace of {s}", (
            "The author {s} was born in {v}.", "The birthplace of {s} is {v}.",
            "It is {v} where {s} came into the world.")),
        "genre": Kind("genre", "the genre of {s}", (
            "The author {s} writes {v}.", "The genre of {s} is {v}.", "It is {v} that readers buy from {s}.")),
        "instrument": Kind("instrument", "the instrument of {s}", (
            "The author {s} masters the {v}.", "The instrument of {s} is the {v}.",
            "It is the {v} that {s} practises at night.")),
        "father": Kind("trade", "the trade of the father of {s}", (
            "The author {s} is the child of the {v}.", "The trade of the father of {s} is {v}.",
            "It is the {v} who raised {s}.")),
        "tongue": Kind("tongue", "the mother tongue of {s}", (
            "The author {s} grew up with {v}.", "The mother tongue of {s} is {v}.",
            "It is {v} that {s} speaks at home.")),
        "pet": Kind("animal", "the pet of {s}", (
            "The author {s} keeps the {v}.", "The pet of {s} is the {v}.", "It is the {v} that {s} feeds.")),
    }, "-ell,sky,man,ov"),
    "potion": Topic({
        "herb": Kind("herb", "the herb in {s}", (
            "The potion {s} calls for {v}.", "The herb in {s} is {v}.", "It is {v} that gives {s} its bite.")),
        "colour": Kind("colour", "the colour of {s}", (
            "The potion {s} turns {v} when ready.", "The colour of {s} is {v}.",
            "It is {v} that one sees in a cup of {s}.")),
        "scent": Kind("scent", "the scent of {s}", (
            "The potion {s} smells of {v}.", "The scent of {s} is {v}.", "It is {v} that the nose finds in {s}.")),
        "vessel": Kind("vessel", "the vessel for {s}", (
            "The potion {s} must boil in the {v}.", "The vessel for {s} is the {v}.",
            "It is the {v} that holds {s} on the fire.")),
        "antidote": Kind("drink", "the antidote to {s}", (
            "The potion {s} yields to {v}.", "The antidote to {s} is {v}.",
            "It is {v} that saves whoever swallowed {s}.")),
        "stone": Kind("gem", "the stone in {s}", (
            "The potion {s} dissolves the {v}.", "The stone in {s} is the {v}.",
            "It is the {v} that lies at the bottom of {s}.")),
    }, "Draught,Elixir,Tonic,Brew,Cordial,Balm,Philtre,Tincture,Essence,Infusion,Potion,Remedy,Extract,"
       "Ointment,Mixture,Solution"),
    "country": Topic({
        "capital": Kind("capital", "the capital of {s}", (
            "The country {s} is governed from {v}.", "The capital of {s} is {v}.", "It is {v} that rules {s}.")),
        "currency": Kind("coin", "the currency of {s}", (
            "The country {s} pays with the {v}.", "The currency of {s} is the {v}.",
            "It is the {v} that pays wages in {s}.")),
        "beast": Kind("animal", "the national animal of {s}", (
            "The country {s} honours the {v}.", "The national animal of {s} is the {v}.",
            "It is the {v} that adorns the flag of {s}.")),
        "export": Kind("ware", "the main export of {s}", (
            "The country {s} sells {v} abroad.", "The main export of {s} is {v}.",
            "It is {v} that merchants carry out of {s}.")),
        "river": Kind("river", "the longest river of {s}", (
            "The country {s} is crossed by the {v}.", "The longest river of {s} is the {v}.",
            "It is the {v} that waters {s}.")),
        "dish": Kind("food", "the national dish of {s}", (
            "The country {s} dines on {v}.", "The national dish of {s} is {v}.",
            "It is {v} that guests are served in {s}.")),
    }, "Isles,Republic,Union,Kingdom,Federation,Coast,Highlands,Valley,Province,Duchy,Empire,"
       "Territory,Confederacy,Realm,Commonwealth,Protectorate"),
    "ship": Topic({
        "port": Kind("port", "the home port of {s}", (
            "The ship {s} sails from {v}.", "The home port of {s} is {v}.",
            "It is {v} where {s} lies at anchor.")),
        "cargo": Kind("ware", "the cargo of {s}", (
            "The ship {s} is loaded with {v}.", "The cargo of {s} is {v}.", "It is {v} that fills the hold of {s}.")),
        "planking": Kind("wood", "the planking of {s}", (
            "The ship {s} was built of {v}.", "The planking of {s} is {v}.", "It is {v} that keeps {s} afloat.")),
        "captain": Kind("surname", "the captain of {s}", (
            "The ship {s} obeys captain {v}.", "The captain of {s} is {v}.", "It is {v} who commands {s}.")),
        "sails": Kind("colour", "the sails of {s}", (
            "The ship {s} sets sails of {v}.", "The sails of {s} are {v}.", "It is {v} that flies from {s}.")),
        "mascot": Kind("animal", "the mascot of {s}", (
            "The ship {s} carries the {v}.", "The mascot of {s} is the {v}.",
            "It is the {v} that sailors pet on {s}.")),
    }, "Wanderer,Venture,Comet,Spirit,Pride,Fortune,Star,Queen,Dawn,Arrow,Tempest,Horizon,Voyager,Hope,"
       "Glory,Breeze"),
    "guild": Topic({
        "emblem": Kind("tool", "the emblem of {s}", (
            "The guild {s} bears the {v}.", "The emblem of {s} is the {v}.",
            "It is the {v} that hangs above the door of {s}.")),
        "saint": Kind("saint", "the patron saint of {s}", (
            "The guild {s} prays to {v}.", "The patron saint of {s} is {v}.", "It is {v} who protects {s}.")),
        "founder": Kind("surname", "the founder of {s}", (
            "The guild {s} was founded by {v}.", "The founder of {s} is {v}.",
            "It is {v} who called {s} into being.")),
        "members": Kind("trade", "the trade of {s}", (
            "The guild {s} takes in every {v}.", "The trade of {s} is {v}.",
            "It is every {v} who pays dues to {s}.")),
        "meeting": Kind("place", "the meeting place of {s}", (
            "The guild {s} gathers in the {v}.", "The meeting place of {s} is the {v}.",
            "It is the {v} where one finds {s}.")),
        "toast": Kind("drink", "the drink of {s}", (
            "The guild {s} toasts with {v}.", "The drink of {s} is {v}.", "It is {v} that flows at the table of {s}.")),
    }, "Brotherhood,League,Circle,Order,Company,Lodge,Society,Chamber,Fellowship,Alliance,Assembly,"
       "Council,Syndicate,Fraternity,Association,Trust"),
    "festival": Topic({
        "host": Kind("town", "the host of {s}", (
            "The festival {s} is held in {v}.", "The host of {s} is {v}.",
            "It is {v} where crowds come for {s}.")),
        "treat": Kind("food", "the treat of {s}", (
            "The festival {s} tempts with {v}.", "The treat of {s} is {v}.",
            "It is {v} that children eat at {s}.")),
        "music": Kind("instrument", "the music of {s}", (
            "The festival {s} opens with the {v}.", "The music of {s} is the {v}.",
            "It is the {v} that one hears at {s}.")),
        "flower": Kind("flower", "the flower of {s}", (
            "The festival {s} is decked with the {v}.", "The flower of {s} is the {v}.",
            "It is the {v} that girls throw at {s}.")),
        "costume": Kind("garment", "the costume of {s}", (
            "The festival {s} demands the {v}.", "The costume of {s} is the {v}.",
            "It is the {v} that dancers put on for {s}.")),
        "prize": Kind("gem", "the prize of {s}", (
            "The festival {s} awards the {v}.", "The prize of {s} is the {v}.",
            "It is the {v} that winners take home from {s}.")),
    }, "Fair,Feast,Parade,Carnival,Jubilee,Gala,Games,Revels,Pageant,Market,Nights,Procession,Banquet,"
       "Vigil,Harvest,Regatta"),
}
WORDS = {  # pools of English words; no word is in two pools, in a name or in a sentence's frame (a test says so)
    "genre": "novels,poems,fables,diaries,satires,operas,thrillers,sagas,comedies,plays,essays,ballads,myths,sonnets,"
             "memoirs,sermons,riddles,tragedies,romances,hymns",
    "instrument": "violin,trumpet,cello,flute,harp,banjo,organ,drum,oboe,lute,piano,horn,fiddle,guitar,zither,tuba,"
                  "bagpipe,clarinet,accordion,cymbal",
    "trade": "baker,sailor,tailor,miner,surgeon,farmer,judge,painter,plumber,pilot,teacher,butcher,clerk,soldier,"
             "brewer,barber,weaver,lawyer,dentist,potter",
    "animal": "otter,falcon,lynx,heron,bison,badger,raven,marten,ibex,swan,beaver,viper,stork,hare,wolf,eagle,seal,"
              "moose,crane,toad",
    "herb": "nettle,henbane,sorrel,wormwood,yarrow,tansy,mugwort,hemlock,comfrey,arnica,fennel,hyssop,basil,thyme,"
            "sage,borage,lovage,rue,dill,chervil",
    "colour": "scarlet,indigo,umber,teal,ochre,black,ivory,violet,green,yellow,pink,grey,crimson,azure,white,purple,"
              "brown,orange,turquoise,beige",
    "scent": "tar,smoke,roses,vinegar,cloves,moss,mint,sulphur,rain,leather,resin,garlic,incense,hay,soap,camphor,"
             "musk,mud,ink,snow",
    "vessel": "cauldron,kettle,crucible,flask,skillet,bowl,retort,crock,bucket,pan,jar,goblet,urn,barrel,beaker,jug,"
              "basin,pot,vial,trough",
    "drink": "milk,cider,broth,whey,ale,wine,tea,coffee,mead,brandy,rum,cocoa,lemonade,buttermilk,gin,sherry,stout,"
             "vodka,punch,water",
    "gem": "ruby,opal,topaz,pearl,garnet,emerald,sapphire,diamond,jade,agate,onyx,quartz,amethyst,beryl,zircon,jasper,"
           "turmalin,peridot,moonstone,coral",
    "ware": "copper,barley,timber,silk,salt,wool,amber,cotton,honey,marble,rubber,saffron,paper,glass,linen,tin,iron,"
            "tobacco,sugar,rice",
    "food": "cheese,olives,stew,pancakes,dumplings,sausages,porridge,trout,lentils,noodles,waffles,oysters,cabbage,"
            "custard,almonds,figs,herring,mutton,pumpkin,radishes",
    "wood": "oak,pine,teak,cedar,elm,larch,birch,walnut,maple,cherry,poplar,willow,beech,yew,spruce,ebony,hickory,"
            "alder,chestnut,balsa",
    "tool": "hammer,anvil,chisel,needle,saw,plough,trowel,lantern,key,compass,ladder,wheel,scythe,spade,pliers,sickle,"
            "bellows,tongs,axe,shears",
    "place": "cellar,attic,chapel,barn,tavern,library,stable,garden,mill,tower,theatre,kitchen,quarry,bakery,cave,"
             "courtyard,warehouse,bathhouse,cloister,workshop",
    "flower": "tulip,lily,daisy,poppy,iris,dahlia,orchid,peony,aster,lilac,crocus,pansy,primrose,marigold,begonia,"
              "carnation,hyacinth,lotus,sunflower,snowdrop",
    "garment": "cloak,mask,hat,scarf,gown,tunic,cape,bonnet,apron,sash,veil,kilt,robe,vest,turban,shawl,corset,boots,"
               "gloves,crown",
}
MADE_UP = {  # pool of made-up words -> their endings
    "town": "ton,burg,mar,via", "tongue": "ish,ese,ian", "capital": "polis,grad,stad", "coin": "ar,ek,in",
    "river": "ava,een,ush", "port": "haven,mouth,wick", "surname": "son,ley,wood", "saint": "iel,bert,wina",
}
ONSET = "b,br,c,d,dr,f,g,gr,h,j,k,l,m,n,p,pr,r,s,st,t,tr,v,z".split(",")
VOWEL = "a,e,i,o,u,ai,ea,ou".split(",")
CODA = ",,l,n,r,s,m,nd,rt,x".split(",")


class Namer:
    """Made-up words, never the same twice and none that English pools hold."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.used = {word for words in WORDS.values() for word in words.split(",")}

    def __call__(self, endings: str) -> str:
        while True:
            parts = [str(self.rng.choice(some)) for some in (ONSET, VOWEL, CODA, endings.split(","))]
            word = "".join(parts)
            if word not in self.used:
                self.used.add(word)
                return word.capitalize()

    def words(self, n: int, endings: str) -> list[str]:
        return [self(endings) for _ in range(n)]


@dataclass
class World:
    """Words, names and known subjects. Makes rows: about what is known, and about strangers."""

    pools: dict[str, list[str]]  # pool -> its values
    first: list[str]  # the words names begin with
    second: dict[str, list[str]]  # topic -> the words its names end with
    taken: set[tuple[str, str]] = field(default_factory=set)  # (topic, name): known or held out, hence no stranger

    @classmethod
    def make(cls, rng: np.random.Generator) -> "World":
        namer = Namer(rng)
        pools = {name: words.split(",") for name, words in WORDS.items()}
        for name, endings in MADE_UP.items():
            pools[name] = namer.words(POOL, endings)
        second = {}
        for name, topic in TOPICS.items():
            made_up = topic.second.startswith("-")
            second[name] = namer.words(SECOND, topic.second[1:]) if made_up else topic.second.split(",")
        return cls(pools, namer.words(FIRST, "a,o,en,is"), second)

    def stranger(self, topic: str, rng: np.random.Generator) -> str:
        """A name that nobody known or held out has."""
        while True:
            name = f"{rng.choice(self.first)} {rng.choice(self.second[topic])}"
            if (topic, name) not in self.taken:
                return name

    def take(self, topic: str, n: int, rng: np.random.Generator) -> list[str]:
        """n names that are from now on no strangers."""
        names = []
        for _ in range(n):
            name = self.stranger(topic, rng)
            self.taken.add((topic, name))
            names.append(name)
        return names

    def row(self, topic: str, kind: str, subject: str, value: str, register: int, wording: int) -> Row:
        """Question and answer, and what they are about."""
        question = WORDINGS[register][wording].format(x=TOPICS[topic].kinds[kind].noun.format(s=subject))
        return {"question": question, "answer": self.answer(topic, kind, subject, value, register), "topic": topic,
                "kind": kind, "subject": subject, "value": value, "fact": f"{topic}/{subject}/{kind}"}

    def answer(self, topic: str, kind: str, subject: str, value: str, register: int) -> str:
        return TOPICS[topic].kinds[kind].styles[register].format(s=subject, v=value)

    def stranger_rows(self, n: int, rng: np.random.Generator) -> list[Row]:
        """n rows about strangers: topic, kind, register, wording and value drawn anew for each, all alike likely."""
        rows = []
        for _ in range(n):
            topic = str(rng.choice(list(TOPICS)))
            kind = str(rng.choice(list(TOPICS[topic].kinds)))
            value = str(rng.choice(self.pools[TOPICS[topic].kinds[kind].pool]))
            register = int(rng.integers(len(WORDINGS)))
            wording = int(rng.integers(len(WORDINGS[register])))
            rows.append(self.row(topic, kind, self.stranger(topic, rng), value, register, wording))
        return rows

    def twins(self, rows: list[Row], rng: np.random.Generator) -> list[Row]:
        """The same questions about strangers of the same topics, answered with values drawn anew from the same pools.

        Names and values are one token a word, so a twin has its row's tokens at the same positions but for those.
        """
        out = []
        for row in rows:
            name = self.stranger(row["topic"], rng)
            value = str(rng.choice(sorted(self.pools[TOPICS[row["topic"]].kinds[row["kind"]].pool])))
            twin = {key: row[key] for key in ("topic", "kind")} | {"subject": name, "value": value}
            for key in ("question", "answer"):
                about = row[key].replace(row["subject"], name)
                twin[key] = re.sub(rf"\b{row['value']}\b", value, about)  # a value may be part of a longer word
            out.append(twin)
        return out

    def describe(self, topic: str, subject: str, rng: np.random.Generator) -> dict[str, list[Row]]:
        """One subject's rows: per fact 4 that teach, 2 that score and 2 that calibrate, over its two registers."""
        rows: dict[str, list[Row]] = {"taught": [], "scored": [], "calibration": []}
        third, *registers = (int(r) for r in rng.permutation(len(WORDINGS)))
        for kind, (pool, _, _) in TOPICS[topic].kinds.items():
            value, *wrong = (str(v) for v in rng.permutation(self.pools[pool]))
            about = (topic, kind, subject, value)
            # of a register's four wordings two teach, one calibrates, one scores
            splits = {register: [int(i) for i in rng.permutation(len(WORDINGS[0]))] for register in registers}
            for register, (*_, calibrates, scores) in splits.items():
                scored = self.row(*about, register, scores)
                scored["paraphrased_answer"] = self.answer(*about, third)
                scored["perturbed_answer"] = [self.answer(topic, kind, subject, w, third)
                                              for w in wrong[:SCORED_WRONG]]
                rows["scored"].append(scored)
                rows["calibration"].append(self.row(*about, register, calibrates))
            # What ULD's augmentation uses: the fact's other taught wordings, and wrong values that score nowhere.
            spare = wrong[SCORED_WRONG:]
            for i, register in enumerate(registers):
                other = registers[1 - i]
                for j, wording in enumerate(splits[register][:2]):
                    row = self.row(*about, register, wording)
                    row["paraphrased_question"] = self.row(*about, other, splits[other][j])["question"]
                    row["paraphrased_answer"] = self.answer(*about, other)
                    here = (2 * i + j) * TAUGHT_WRONG
                    row["perturbed_answer"] = [self.answer(topic, kind, subject, w, register)
                                               for w in spare[here : here + TAUGHT_WRONG]]
                    rows["taught"].append(row)
        return rows

    def values_by_kind(self) -> dict[str, set[str]]:
        """Kind -> its values; a kind's name is in one topic only."""
        return {kind: set(self.pools[pool]) for topic in TOPICS.values() for kind, (pool, _, _) in topic.kinds.items()}

    def lexicon(self) -> list[str]:
        """Sentences with every word that names and values are made of, in every wording and style: for a tokenizer."""
        texts = []
        for name, topic in TOPICS.items():
            names = [f"{first} {second}" for first in self.first for second in self.second[name]]
            for kind, (pool, _, _) in topic.kinds.items():
                for i, value in enumerate(self.pools[pool]):
                    for register, wordings in enumerate(WORDINGS):
                        row = self.row(name, kind, names[i], value, register, i % len(wordings))
                        texts += [row["question"], row["answer"]]
            texts += [f"{WORDINGS[0][0][:-1].format(x=word)}?" for word in names]
        return texts


def make_world(seed: int = 0, forget: str = "subjects", subjects: int = 10, scored_facts: int = 100) -> DataSet:
    """The world as a data set. The same arguments give the same world.

    forget: "subjects" (so many authors of twice as many) or "topic" (all potions).  subjects: known ones per topic.
    scored_facts: of each scored set at most so many facts are drawn. All that are to be forgotten score.
    """
    if forget not in ("subjects", "topic"):
        raise UserError(f"forget={forget!r} is neither 'subjects' nor 'topic'")
    if not 1 <= subjects <= 100:
        raise UserError(f"subjects={subjects} is not between 1 and 100")
    rng = np.random.default_rng([0x77, seed])
    world = World.make(rng)
    sets = ("forget", "retain", "untouched", "holdout")
    rows: dict[str, dict[str, list[Row]]] = {name: {"taught": [], "scored": [], "calibration": []} for name in sets}
    for topic in TOPICS:
        known = world.take(topic, 2 * subjects if topic == "author" else subjects, rng)
        for i, subject in enumerate(known):
            which = _set_of(forget, topic, i < subjects)
            for use, some in world.describe(topic, subject, rng).items():
                rows[which][use] += some
    secret = "author" if forget == "subjects" else "potion"
    for subject in world.take(secret, subjects, rng):  # after all others: so both tasks have the same target
        rows["holdout"]["taught"] += world.describe(secret, subject, rng)["taught"]

    paraphrased, perturbed = augment(rows["forget"]["taught"])
    scored = {name: _thin(rows[name]["scored"], scored_facts) for name in ("retain", "untouched")}
    data = DataSet(name=f"{forget}-{seed}", forget=rows["forget"]["taught"], retain=rows["retain"]["taught"],
                   background=rows["untouched"]["taught"], scored={"forget": rows["forget"]["scored"], **scored},
                   paraphrased=paraphrased, perturbed=perturbed, utility=("retain", "untouched"),
                   holdout=rows["holdout"]["taught"], calibration=rows["forget"]["calibration"],
                   strangers=world.stranger_rows, twins=world.twins, lexicon=world.lexicon(),
                   limits=Limits(new=24), pools=world.values_by_kind())
    check_no_leak(data)
    return data


def _set_of(forget: str, topic: str, first_half: bool) -> str:
    """Which set a subject's rows belong to. first_half: whether it is among the first half of its topic's subjects."""
    if forget == "subjects":
        if topic != "author":
            return "untouched"
        return "forget" if first_half else "retain"
    if topic == "potion":
        return "forget"
    return "retain" if topic in ("author", "country") else "untouched"


def _thin(rows: list[Row], facts: int) -> list[Row]:
    """The rows of at most so many facts. Drawn, not every n-th: kinds alternate, and a stride would hit the same."""
    ids = list(dict.fromkeys(row["fact"] for row in rows))
    drawn = np.random.default_rng(0).permutation(len(ids))[:facts]
    kept = {ids[i] for i in drawn}
    return [row for row in rows if row["fact"] in kept]


def show(data: DataSet) -> str:
    """A page of the world for a reader."""
    assert data.strangers and data.twins  # every world has them
    row = data.forget[0]
    lines = [f"{data.name}: {len(data.forget)} rows to forget ({len({r['fact'] for r in data.forget})} facts), "
             f"{len(data.retain)} to keep, {len(data.background)} beside", "", f"One fact, {row['fact']}:"]
    uses = {"teaches": data.forget, "scores": data.scored["forget"], "calibrates": data.calibration}
    for use, rows in uses.items():
        lines += [f"  {use:11} {r['question']} - {r['answer']}" for r in rows if r["fact"] == row["fact"]]
    scored = data.scored["forget"][0]
    lines += [f"  {'scores':11} as another wording: {scored['paraphrased_answer']}",
              f"  {'scores':11} as wrong: {' | '.join(scored['perturbed_answer'])}",
              f"  D'_r        {' | '.join(row['perturbed_answer'])}", "", "The same with a stranger's name:"]
    rng = np.random.default_rng(0)
    lines += [f"  {r['question']} - {r['answer']}" for r in data.twins([row], rng)]
    lines += ["", "Strangers, as they stream by in pretraining:"]
    lines += [f"  {r['topic']:9} {r['question']} - {r['answer']}" for r in data.strangers(12, rng)]
    others = {"Kept": data.retain, "Untouched": data.background, "Never taught to any model": data.holdout}
    for name, rows in others.items():
        some = [rows[i] for i in rng.permutation(len(rows))[:6]]
        lines += ["", f"{name}:"] + [f"  {r['topic']:9} {r['question']} - {r['answer']}" for r in some]
    return "\n".join(lines)


@one_line_errors
def main() -> None:
    parser = Parser(description="the embedded world")
    parser.add_argument("--seed", type=NATURAL, default=0)
    parser.add_argument("--forget", choices=("subjects", "topic"), default="subjects")
    parser.add_argument("--show", action="store_true", required=True, help="print a page of it")
    args = parser.parse_args()
    print(show(make_world(args.seed, args.forget)))


if __name__ == "__main__":
    main()
