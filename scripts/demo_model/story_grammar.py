# Copyright 2026 The mrv1 authors. SPDX-License-Identifier: Apache-2.0
"""Story grammar of the demo model: one definition, used as a generator and as a parser.

The grammar is a weighted context-free grammar whose alternatives may bind variables. A template
such as ``"{He} lived in {home}."`` mixes literal text with slots:

* ``{rule}`` expands a rule: one alternative is chosen with probability weight / sum of weights.
* ``{rule@var}`` expands the rule ``rule.<value of var>``, so a consequence follows from its cause.
* ``{var}`` repeats a bound variable (name, pronoun, object, place), so a story stays consistent.

The alternatives of a rule always differ within the text that precedes their first inner choice
(``check_grammar`` verifies it). Two derivations that part at a choice therefore produce different
text before either of them ends: every text has exactly one derivation.
"""

from __future__ import annotations

import argparse
import math
import random
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Stands for the end of a story inside the grammar. It makes "stop here" a choice like any other.
END = "\x03"
START = "story"


@dataclass(frozen=True)
class Slot:
    """A ``{name}`` or ``{name@selector}`` slot of a template."""

    name: str
    selector: str | None = None


Symbol = str | Slot


@dataclass(frozen=True)
class Alternative:
    """One alternative of a rule: its text, its weight and the variables that it binds."""

    symbols: tuple[Symbol, ...]
    weight: int
    sets: Mapping[str, str]


@dataclass(frozen=True)
class Story:
    """A generated story.

    Attributes:
        text: The story, without any end marker.
        log_prob: Natural log of the probability of all choices, the choice to end included.
        derivation: The choices in order, as (rule, index of the alternative).
    """

    text: str
    log_prob: float
    derivation: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class ParseResult:
    """What ``parse`` found.

    Attributes:
        accepted: True if the text is a story (or, for an incomplete text, begins one).
        reason: Why the text was rejected; empty when accepted.
        offset: Length of the longest viable beginning; ``len(text)`` when accepted.
        log_prob: As in ``Story``; None for rejected and for incomplete texts.
        derivation: As in ``Story``; empty for rejected and for incomplete texts.
    """

    accepted: bool
    reason: str
    offset: int
    log_prob: float | None = None
    derivation: tuple[tuple[str, int], ...] = ()


_SLOT = re.compile(r"\{(\w+)(?:@(\w+))?\}")


def _symbols(template: str) -> tuple[Symbol, ...]:
    out: list[Symbol] = []
    at = 0
    for match in _SLOT.finditer(template):
        if match.start() > at:
            out.append(template[at : match.start()])
        out.append(Slot(match.group(1), match.group(2)))
        at = match.end()
    if at < len(template):
        out.append(template[at:])
    return tuple(out)


def _alt(template: str, weight: int = 1, /, **sets: str) -> Alternative:
    return Alternative(_symbols(template), weight, sets)


def _alts(*templates: str, **sets: str) -> list[Alternative]:
    return [_alt(template, **sets) for template in templates]


_PRONOUNS = {
    "m": {"he": "he", "him": "him", "his": "his", "He": "He", "His": "His"},
    "f": {"he": "she", "him": "her", "his": "her", "He": "She", "His": "Her"},
}


def _names(names: str, gender: str) -> list[Alternative]:
    return [_alt(name, name=name, **_PRONOUNS[gender]) for name in names.split()]


def _words(words: str, var: str, **sets: str) -> list[Alternative]:
    """Alternatives from a comma-separated list; each binds ``var`` to its own text."""
    return [_alt(word.strip(), **{var: word.strip()}, **sets) for word in words.split(",")]


def _phrases(phrases: str, var: str, then: str = "") -> list[Alternative]:
    """Alternatives such as "an old owl"; each binds ``var`` to its last word and adds ``then``."""
    return [
        _alt(phrase.strip() + then, **{var: phrase.split()[-1]}) for phrase in phrases.split(",")
    ]


def _helpers(helpers: str) -> list[Alternative]:
    return _phrases(helpers, "hkind", " named {helper_name}")


_LOOKS = "red blue green yellow purple striped painted polished shiny tiny silver golden"

RULES: dict[str, list[Alternative]] = {
    # --- Setting: hero, home, treasure -------------------------------------------------------
    "story": [
        _alt("Once upon a time, there was {hero}. {home_sentence} {treasure}", 6),
        _alt("Once upon a time, in {home}, there lived {hero}. {treasure}", 4),
        _alt("Long ago, there was {hero}. {home_sentence} {treasure}", 2),
        _alt("Long ago, in {home}, there lived {hero}. {treasure}", 2),
        _alt("There once was {hero} who lived in {home}. {treasure}", 3),
        _alt("This is the story of {hero}. {home_sentence} {treasure}", 2),
        _alt("In {home} lived {hero}. {treasure}", 2),
    ],
    "hero": [_alt("{trait_word} {species_word} named {name@group}")],
    "trait_word": _phrases(
        "a brave, a kind, a curious, a clever, a patient, a cheerful, a gentle, an honest, "
        "a careful, a determined",
        "trait",
    ),
    "species_word": [
        _alt("girl", 8, species="girl", group="girl"),
        _alt("boy", 6, species="boy", group="boy"),
        *_words(
            "rabbit, fox, hedgehog, mouse, bear, badger, otter, mole", "species", group="animal"
        ),
    ],
    "name.girl": _names(
        "Lily Mia Anna Ruby Clara Nora Ivy Zoe Emma Rosa Tessa Maya Alice Wren Sofia June Pearl "
        "Daisy",
        "f",
    ),
    "name.boy": _names(
        "Tom Leo Max Oscar Jack Finn Sam Noah Hugo Ben Theo Arlo Eli Felix Owen Miles Peter Jonas",
        "m",
    ),
    "name.animal": [
        *_names("Bramble Hazel Poppy Willow Clover Olive", "f"),
        *_names("Pip Rusty Bracken Thistle Nutmeg Barley", "m"),
    ],
    "treasure": [
        _alt("{His} {new_giver} had once given {him} {thing}.{use}", 3),
        _alt("{He} had {thing}, a gift from {his} {new_giver}.{use}", 5),
        _alt("{name} owned {thing} that {his} {new_giver} had made.{use}", 2),
        _alt("For {name}'s birthday, {his} {new_giver} gave {him} {thing}.{use}", 3),
    ],
    "new_giver": _words(
        "grandmother, grandfather, mother, father, aunt, uncle, big sister, big brother, "
        "best friend, neighbour",
        "giver",
    ),
    "thing": [_alt("a {look} {object}")],
    "look": [_alt(look) for look in _LOOKS.split()],
    "object": [
        *_words(
            "drum, flute, fiddle, trumpet, whistle, harmonica, bell, tambourine, banjo",
            "obj",
            kind="music",
        ),
        *_words(
            "kite, ball, spinning top, puppet, toy boat, toy train, hoop, rag doll, "
            "wooden horse, marble",
            "obj",
            kind="toy",
        ),
        *_words("hat, scarf, cap, cloak, necklace, bracelet, ribbon, belt", "obj", kind="wear"),
        *_words(
            "compass, telescope, lantern, umbrella, magnifying glass, pocket watch, "
            "walking stick, rucksack",
            "obj",
            kind="tool",
        ),
        *_words(
            "storybook, notebook, sketchbook, paintbox, diary, songbook, puzzle box, jewel box",
            "obj",
            kind="keepsake",
        ),
    ],
    # --- The journey -------------------------------------------------------------------------
    "use": [_alt(" {use_sentence@kind}{journey}", 3), _alt("{journey}", 2)],
    "journey": _alts("\n\nOne {weather} {part_of_day}, {set_off}"),
    "set_off": [
        _alt("{name} took the {obj} to {new_place}{purpose@scene}", 3),
        _alt("{he} set off for {new_place} with the {obj}{purpose@scene}", 3),
        _alt("{name} packed a sandwich and carried the {obj} to {new_place}{purpose@scene}", 2),
    ],
    "new_place": [
        *_words(
            "the pine forest, the old oak wood, the birch grove, the whispering woods, "
            "the beech forest, the hazel copse",
            "place",
            scene="wood",
        ),
        *_words(
            "the river, the mill pond, the blue lake, the winding stream, the harbour, "
            "the duck pond",
            "place",
            scene="water",
        ),
        *_words(
            "the windy hill, the high cliffs, the rocky mountain, the castle ruins, "
            "the steep pass, the giant's rock",
            "place",
            scene="hill",
        ),
        *_words(
            "the market square, the town hall, the railway station, the spring fair, "
            "the main street, the bakery",
            "place",
            scene="town",
        ),
        *_words(
            "the dairy farm, the hay meadow, the sheep pasture, the big red barn, "
            "the vegetable field, the farmyard",
            "place",
            scene="farm",
        ),
        *_words(
            "the rose garden, the city park, the palace gardens, the orchard, "
            "the botanical garden, the lavender garden",
            "place",
            scene="garden",
        ),
    ],
    "purpose.wood": _alts(
        " to look for mushrooms.{arrive}",
        " to pick blackberries.{arrive}",
        " to listen to the birds.{arrive}",
        ".{arrive}",
    ),
    "purpose.water": _alts(
        " to watch the boats.{arrive}",
        " to feed the ducks.{arrive}",
        " to skip stones.{arrive}",
        ".{arrive}",
    ),
    "purpose.hill": _alts(
        " to see the view.{arrive}",
        " to look for eagles.{arrive}",
        " to have a picnic.{arrive}",
        ".{arrive}",
    ),
    "purpose.town": _alts(
        " to buy fresh bread.{arrive}",
        " to meet some friends.{arrive}",
        " to hear the brass band.{arrive}",
        ".{arrive}",
    ),
    "purpose.farm": _alts(
        " to see the new lambs.{arrive}",
        " to help with the harvest.{arrive}",
        " to fetch some eggs.{arrive}",
        ".{arrive}",
    ),
    "purpose.garden": _alts(
        " to smell the flowers.{arrive}",
        " to pick ripe plums.{arrive}",
        " to draw the butterflies.{arrive}",
        ".{arrive}",
    ),
    "arrive": [_alt(" {arrival@scene} {trouble}", 3), _alt(" {trouble}", 2)],
    "trouble": [
        _alt("Suddenly, {cause@scene} {consequence@cause} {feeling}", 4),
        _alt("All at once, {cause@scene} {consequence@cause} {feeling}", 2),
        _alt("But then {cause@scene} {consequence@cause} {feeling}", 2),
        _alt("Without warning, {cause@scene} {consequence@cause} {feeling}", 1),
    ],
    "feeling": _alts(
        "{name}'s heart sank.\n\n{solve}",
        "{name} did not know what to do.\n\n{solve}",
        "{name} could hardly believe it.\n\n{solve}",
        "Poor {name} nearly cried.\n\n{solve}",
        '"Oh no!" cried {name}.\n\n{solve}',
    ),
    # --- The solution ------------------------------------------------------------------------
    "solve": [
        _alt("{reaction@trait} {solo@cause} {relief}", 5, how="alone"),
        _alt("Just then, {helper@scene} came along. {question}", 2, how="helped"),
        _alt("Luckily, {helper@scene} was passing by. {question}", 2, how="helped"),
        _alt("Before long, {helper@scene} appeared. {question}", 2, how="helped"),
    ],
    "relief": _alts(
        "{name} hugged the {obj} and laughed with relief.{ending}",
        "{name} danced for joy.{ending}",
        '"Hooray!" shouted {name}.{ending}',
        "The {obj} was as good as new.{ending}",
    ),
    "helper.wood": _helpers("an old owl, a gentle deer, a strong woodcutter, a wise raven"),
    "helper.water": _helpers("a grey heron, a friendly fisherman, a graceful swan, a slow turtle"),
    "helper.hill": _helpers("a tall shepherd, a bold eagle, a busy marmot, a merry hiker"),
    "helper.town": _helpers("a jolly baker, a young postman, a stray cat, a polite policeman"),
    "helper.farm": _helpers("a kindly farmer, a sturdy donkey, a loyal sheepdog, a plump hen"),
    "helper.garden": _helpers("a cheery gardener, a proud peacock, a small robin, a green frog"),
    "helper_name": _words(
        "Otto, Greta, Barnaby, Matilda, Walter, Agnes, Humphrey, Edith, Cornelius, Martha, "
        "Gilbert, Beatrice, Ambrose, Winifred, Stanley, Dorothy",
        "hname",
    ),
    "question": _alts(
        '"What is the matter?" asked the {hkind}. {answer}',
        '"Why are you so sad?" asked the {hkind}. {answer}',
        '"Can I help you?" asked the {hkind}. {answer}',
    ),
    "answer": [_alt('"{problem@cause}," said {name}.{offer}')],
    "offer": [
        _alt(' "Do not worry," said {hname}. {helped@cause} {thanks}', 3),
        _alt(' "We can put that right," said {hname}. {helped@cause} {thanks}', 2),
        _alt(" {hname} nodded and thought for a moment. {helped@cause} {thanks}", 2),
        _alt("\n\n{helped@cause} {thanks}", 1),
    ],
    "thanks": [
        _alt('"Thank you, {hname}!" said {name}.{snack}', 3),
        _alt("{name} thanked the {hkind} with all {his} heart.{snack}", 2),
        _alt('"You are a true friend, {hname}," said {name}.{snack}', 2),
    ],
    "snack": [_alt(" Then they shared {food}.{ending}", 2), _alt("{ending}", 3)],
    # --- The ending --------------------------------------------------------------------------
    "ending": [_alt("\n\n{tale} {lesson}", 3), _alt("\n\n{lesson}", 3)],
    "tale": _alts(
        "Back home, {name} told {his} {giver} the whole story.",
        "In the evening, {he} showed {his} {giver} that the {obj} was safe.",
        "{name} and the {obj} were home before dark.",
        "When {he} came back from {place}, {his} {giver} was waiting at the door.",
    ),
    "lesson": [
        _alt("From that day on, {name} {habit@cause}{close@how}", 3),
        _alt("After that, {name} {habit@cause}{close@how}", 2),
    ],
    "close.alone": [_alt(" {moral@trait}{finish}", 3), _alt("{finish}", 2)],
    "close.helped": [
        _alt(" {moral@trait}{finish}", 1),
        _alt(" {friendship}{finish}", 3),
        _alt("{finish}", 1),
    ],
    "finish": [_alt(f" The end.{END}", 2), _alt(END, 3)],
}


# More sentences, one "rule: template" a line.
_SENTENCES = """
home: a small village by the sea
home: a cottage at the edge of the woods
home: a stone house on a hill
home: a little house beside a mill
home: a cosy cabin near a lake
home: a quiet valley
home: a narrow street full of shops
home: a lighthouse on a rocky coast
home: a farmhouse among the fields
home: a tall house with a crooked chimney
home: a snug home under an oak tree
home: an old town with many bridges
home_sentence: {He} lived in {home}.
home_sentence: {His} home was in {home}.
weather: sunny
weather: windy
weather: cloudy
weather: warm
weather: cool
weather: bright
weather: misty
weather: fresh
weather: golden
weather: quiet
part_of_day: morning
part_of_day: afternoon
part_of_day: day in spring
part_of_day: summer day
part_of_day: autumn day
part_of_day: Saturday
use_sentence.music: {He} played it every evening.
use_sentence.music: Everyone in the family loved its sound.
use_sentence.music: {name} practised on it every day.
use_sentence.toy: {He} played with it from morning till night.
use_sentence.toy: No other toy was half as much fun.
use_sentence.toy: {name} shared it with all {his} friends.
use_sentence.wear: {He} wore it every single day.
use_sentence.wear: Everyone said that it looked splendid.
use_sentence.wear: {name} even wore it in bed.
use_sentence.tool: {He} never went exploring without it.
use_sentence.tool: It had already been on many adventures.
use_sentence.tool: {name} polished it every Sunday.
use_sentence.keepsake: {He} kept it next to {his} pillow.
use_sentence.keepsake: Nobody else was allowed to open it.
use_sentence.keepsake: {name} took great care of it.
arrival.wood: The leaves rustled softly overhead.
arrival.wood: Sunbeams danced between the trunks.
arrival.wood: It smelled of moss and pine needles.
arrival.water: The water sparkled in the light.
arrival.water: Dragonflies hummed over the reeds.
arrival.water: Little waves lapped at the bank.
arrival.hill: The path wound up and up.
arrival.hill: From up there, the houses looked like toys.
arrival.hill: Far below, a river shone like a ribbon.
arrival.town: The air smelled of warm buns.
arrival.town: Bells were ringing in the tower.
arrival.town: People hurried by with full baskets.
arrival.farm: The cows were grazing peacefully.
arrival.farm: Hens scratched about in the straw.
arrival.farm: A rooster crowed from the fence.
arrival.garden: The flowers were in full bloom.
arrival.garden: Butterflies fluttered from bush to bush.
arrival.garden: Somewhere, a fountain was splashing.
reaction.brave: But {name} was brave and took a deep breath.
reaction.brave: Still, a brave {species} does not give up.
reaction.kind: But {name} was too kind to be angry with anyone.
reaction.kind: Still, a kind {species} does not stay cross for long.
reaction.curious: But {name} was curious and took a closer look.
reaction.curious: Still, a curious {species} always finds another way to look at things.
reaction.clever: But {name} was clever and soon had an idea.
reaction.clever: Still, a clever {species} is never without a plan.
reaction.patient: But {name} was patient and counted slowly to ten.
reaction.patient: Still, a patient {species} has time for everything.
reaction.cheerful: But {name} was cheerful and began to hum a tune.
reaction.cheerful: Still, a cheerful {species} can smile at anything.
reaction.gentle: But {name} was gentle and stayed quite calm.
reaction.gentle: Still, a gentle {species} never shouts.
reaction.honest: But {name} was honest and admitted that {he} should have been more careful.
reaction.honest: Still, an honest {species} does not blame others.
reaction.careful: But {name} was careful and thought before {he} moved.
reaction.careful: Still, a careful {species} never rushes into things.
reaction.determined: But {name} was determined and rolled up {his} sleeves.
reaction.determined: Still, a determined {species} tries again.
food: some bread and cheese
food: a honey cake
food: two crisp apples
food: a bag of cherries
food: a slice of plum pie
food: a handful of nuts
food: some warm buns
food: a big pear
friendship: And {name} and {hname} stayed friends for ever.
friendship: And every Sunday, {he} went to visit {hname} the {hkind}.
friendship: And {hname} the {hkind} was always welcome at {name}'s home.
moral.brave: A brave heart finds a way.
moral.kind: A kind word opens many doors.
moral.curious: A curious mind is never bored.
moral.clever: A clever idea is worth more than gold.
moral.patient: A patient friend sees every flower bloom.
moral.cheerful: A cheerful song makes the road short.
moral.gentle: A gentle hand mends more than a strong one.
moral.honest: An honest answer is the best answer.
moral.careful: A careful step is never wasted.
moral.determined: A determined traveller always arrives.
"""

# What can happen in each scene, under "[scene cause]", and all that follows from that cause.
_TROUBLES = """
[wood wind]
cause: a gust of wind tore the {obj} away from {him}.
cause: the wind roared and blew the {obj} up into the air.
consequence: It caught on the highest branch of a pine tree.
consequence: Now the {obj} hung at the top of a pine tree, far out of reach.
problem: My {obj} is stuck at the top of a pine tree
solo: {He} climbed the pine tree, branch by branch, until {he} could reach the {obj}.
solo: With a long stick, {he} shook the branch of the pine tree until the {obj} came down.
helped: {hname} went straight up the pine tree and brought the {obj} down.
helped: Together they shook the pine tree until the {obj} fell into {name}'s arms.
habit: always held on tight when the wind blew.

[wood squirrel]
cause: a cheeky squirrel snatched the {obj} and ran off.
cause: a squirrel dropped from a branch and made off with the {obj}.
consequence: It hid the {obj} in a hollow oak.
consequence: In a flash, the {obj} was deep inside a hollow oak.
problem: A squirrel has hidden my {obj} in a hollow oak
solo: {He} left a pile of acorns beside the hollow oak, and the squirrel gladly gave the {obj} back.
helped: {hname} had a quiet word with the squirrel, and soon the {obj} came flying out of the \
hollow oak.
habit: always carried a few acorns for the squirrels.

[wood root]
cause: {name} tripped over a root and dropped the {obj}.
cause: {name}'s foot caught on a root, and the {obj} went flying.
consequence: It tumbled down into a dark burrow.
consequence: The {obj} vanished into a dark burrow.
problem: My {obj} has fallen into a burrow
solo: {He} lay down flat, reached as far as {he} could, and pulled the {obj} out of the burrow.
helped: {hname} dug away the earth, and {name} pulled the {obj} out of the burrow.
habit: always watched the path for roots.

[wood fog]
cause: a thick fog rolled in between the trees.
cause: the fog came down like a grey curtain.
consequence: {name} had put the {obj} down, and now {he} could not find it.
consequence: The {obj} had been lying right there, but now there was only fog.
problem: I have lost my {obj} in the fog
solo: {He} waited until the fog had lifted, and there was the {obj}, beside a mossy stone.
helped: {hname} knew every inch of the ground and led {name} through the fog to the {obj}.
habit: never put anything down in a fog.

[water slip]
cause: {name} slipped on a wet stone and let go of the {obj}.
cause: {name}'s foot slid on a wet stone, and the {obj} fell.
consequence: It splashed into the water and drifted away.
consequence: With a splash, the {obj} landed in the water and drifted off.
problem: My {obj} is drifting away on the water
solo: {He} ran along the bank and fished the {obj} out with a long branch.
helped: {hname} went into the water without a second thought and brought the {obj} back.
habit: always walked slowly on wet stones.

[water wave]
cause: a big wave broke over the bank and swept the {obj} away.
cause: the wake of a ship rolled in and washed the {obj} off the bank.
consequence: It bobbed about in deep water.
consequence: Soon the {obj} was bobbing about in deep water.
problem: A wave has carried my {obj} into deep water
solo: {He} tied some logs into a raft, paddled out and picked the {obj} up.
helped: {hname} found an old rowing boat, and together they rowed out to the {obj}.
habit: never left anything close to the waves.

[water goose]
cause: a grumpy goose grabbed the {obj} and paddled off.
cause: an angry goose hissed, took the {obj} and swam away.
consequence: It dropped the {obj} in the reeds on the far side.
consequence: On the far side, it let the {obj} fall into the reeds.
problem: A goose has dropped my {obj} in the reeds
solo: {He} walked all the way round to the far side and found the {obj} in the reeds.
helped: {hname} showed {name} a row of stepping stones, and they fetched the {obj} from the reeds.
habit: always gave geese plenty of room.

[water plank]
cause: a plank of the old jetty snapped.
cause: the old jetty creaked, and a plank broke in two.
consequence: {name} jumped clear, but the {obj} fell through the gap.
consequence: The {obj} dropped through the gap and stuck in the mud below.
problem: My {obj} fell through the gap in the jetty
solo: {He} made a hook from a bent twig and pulled the {obj} up through the gap in the jetty.
helped: {hname} crept under the jetty and handed the {obj} up through the gap.
habit: always tested a plank before stepping on it.

[hill stumble]
cause: {name} stumbled on the steep path and dropped the {obj}.
cause: {name} took a step too quickly, and the {obj} tumbled down the steep path.
consequence: It disappeared into a thorn bush.
consequence: At the bottom, the {obj} vanished into a thorn bush.
problem: My {obj} is caught in a thorn bush
solo: {He} pushed the thorns aside with a stick, one by one, and lifted the {obj} out.
helped: {hname} held back the thorns while {name} lifted the {obj} out.
habit: always took small steps on steep paths.

[hill storm]
cause: a storm broke with thunder and rain.
cause: the sky turned black, and a storm began.
consequence: {name} ran for shelter and left the {obj} behind on the rocks.
consequence: In the rush for shelter, the {obj} was left on the rocks.
problem: I left my {obj} on the rocks in the storm
solo: {He} waited in a cave until the storm was over, and then {he} fetched the {obj} from the \
rocks.
helped: {hname} waited with {name} until the storm was over, and together they found the {obj} on \
the rocks.
habit: always looked at the sky before setting out.

[hill goat]
cause: a mountain goat hooked the {obj} on one of its horns.
cause: a shaggy goat trotted up and took the {obj} in its mouth.
consequence: It jumped on to a narrow ledge and stayed there.
consequence: With three leaps, it carried the {obj} to a narrow ledge.
problem: A goat has taken my {obj} to a narrow ledge
solo: {He} held out some sweet clover until the goat came down from the ledge with the {obj}.
helped: {hname} whistled, and the goat came down from the ledge with the {obj}.
habit: always brought sweet clover for the goats.

[hill rocks]
cause: some loose stones came rattling down the slope.
cause: the slope began to slide, and stones rained down.
consequence: They buried the {obj} completely.
consequence: When the dust settled, the {obj} was buried.
problem: My {obj} is buried under the stones
solo: {He} moved the stones, one after another, until the {obj} lay free.
helped: {hname} and {name} rolled the stones aside until the {obj} lay free.
habit: always kept away from loose stones.

[town crowd]
cause: a noisy crowd came pouring down the street.
cause: the street filled with a noisy crowd.
consequence: In the bustle, the {obj} was kicked under a market stall.
consequence: Somebody bumped into {name}, and the {obj} rolled under a market stall.
problem: My {obj} has rolled under a market stall
solo: {He} waited for the crowd to pass, crawled under the market stall and picked up the {obj}.
helped: {hname} kept the crowd back while {name} crawled under the market stall for the {obj}.
habit: always held on tight in a crowd.

[town cart]
cause: a runaway cart came rattling round the corner.
cause: {name} heard wheels, and a runaway cart raced past.
consequence: {name} leapt aside, but the {obj} landed on the cart and was carried away.
consequence: The {obj} was knocked on to the cart and was gone in a moment.
problem: A runaway cart has carried off my {obj}
solo: {He} followed the wheel tracks to a stable, and there stood the cart with the {obj} on it.
helped: {hname} knew where the cart belonged, and behind a stable they found the {obj}.
habit: always looked both ways before crossing.

[town magpie]
cause: a magpie swooped down and seized the {obj}.
cause: two black wings flapped, and a magpie had the {obj}.
consequence: It dropped the {obj} on a steep roof.
consequence: Laughing, the bird left the {obj} on a steep roof.
problem: A magpie has dropped my {obj} on a roof
solo: {He} climbed the winding stairs to the attic and reached the {obj} from the roof window.
helped: {hname} leaned a long ladder against the wall and fetched the {obj} from the roof.
habit: always kept an eye on the magpies.

[town porter]
cause: a busy porter picked up the {obj} by mistake.
cause: somebody called, and a porter took the {obj} for a parcel.
consequence: A minute later, it was packed into a crate.
consequence: The {obj} ended up in a crate with a hundred parcels.
problem: My {obj} was packed into a crate by mistake
solo: {He} explained everything to the porter, who opened the crate and took out the {obj}.
helped: {hname} spoke to the porter, and when the crate was opened, out came the {obj}.
habit: always wrote a name on everything.

[farm mud]
cause: {name} lost {his} balance beside the pigsty.
cause: {name} bumped into the fence of the pigsty.
consequence: The {obj} flew through the air and sank into the mud.
consequence: Splat! Down went the {obj} into the deepest mud.
problem: My {obj} has sunk into the mud
solo: {He} borrowed a rake, pulled the {obj} out of the mud and washed it at the pump.
helped: {hname} waded into the mud, and at the pump they washed the {obj} clean.
habit: always walked carefully past the pigsty.

[farm hay]
cause: a farmhand tossed a forkful of hay right over the {obj}.
cause: the hay wagon tipped over and buried the {obj}.
consequence: It was lost in an enormous haystack.
consequence: Somewhere in all that hay, the {obj} was lost.
problem: My {obj} is lost in the haystack
solo: {He} searched the haystack, handful by handful, until {he} felt the {obj}.
helped: {hname} turned the haystack upside down, and out fell the {obj}.
habit: never put anything down near the hay.

[farm cow]
cause: a curious cow picked up the {obj} with its mouth.
cause: {name} felt a warm breath, and a cow pulled the {obj} away.
consequence: It carried the {obj} into the middle of the herd.
consequence: Chewing slowly, it strolled back to the herd with the {obj}.
problem: A cow has taken my {obj} into the herd
solo: {He} rang the bell that called the herd home, and the cow dropped the {obj} at the gate.
helped: {hname} called the cow by its name, and it left the herd and gave the {obj} back.
habit: always stayed on the right side of the fence.

[farm well]
cause: the lid of the old well gave way.
cause: {name} leaned too far over the old well.
consequence: The {obj} slid over the edge and fell into the bucket far below.
consequence: Down and down fell the {obj}, until it landed in the bucket.
problem: My {obj} has fallen down the well
solo: {He} turned the handle of the well until the bucket came up with the {obj} in it.
helped: {hname} and {name} turned the handle of the well together, and up came the {obj}.
habit: always stood well back from wells.

[garden puppy]
cause: a playful puppy bounded up and grabbed the {obj}.
cause: {name} heard a bark, and a puppy ran off with the {obj}.
consequence: It buried the {obj} in a flower bed.
consequence: Soon it had buried the {obj} in a flower bed.
problem: A puppy has buried my {obj} in a flower bed
solo: {He} followed the paw prints to the flower bed and dug up the {obj}.
helped: {hname} knew the puppy's favourite flower bed, and there they dug up the {obj}.
habit: always kept a biscuit ready for puppies.

[garden bees]
cause: a swarm of bees came buzzing out of a hive.
cause: {name} brushed against a hive, and the bees came out.
consequence: {name} fled and left the {obj} beside the hive.
consequence: The {obj} fell in front of the hive, and nobody dared to go near.
problem: My {obj} is lying beside the bees
solo: {He} waited until the bees had gone to sleep and tiptoed back for the {obj}.
helped: {hname} was not afraid of bees at all and calmly fetched the {obj}.
habit: always walked softly past every hive.

[garden fountain]
cause: the great fountain burst into life.
cause: water shot up from the great fountain.
consequence: The spray lifted the {obj} on to the head of a statue.
consequence: Up went the {obj}, and it came down on the head of a statue.
problem: My {obj} is on the head of a statue
solo: {He} stacked three flower pots, stepped up and took the {obj} from the statue.
helped: {hname} turned off the fountain and lifted the {obj} down from the statue.
habit: always admired fountains from a distance.

[garden gate]
cause: the iron gate swung shut with a clang.
cause: somebody locked the iron gate.
consequence: The {obj} was left on the other side of the bars.
consequence: Behind the bars, the {obj} lay all alone on the grass.
problem: My {obj} is locked in behind the gate
solo: {He} found a gap under the hedge, wriggled through and got the {obj} back.
helped: {hname} knew where the key was hidden, and soon the gate was open and the {obj} was safe.
habit: always looked twice before leaving a garden.
"""


def _add_rules() -> None:
    """Adds the rules of the two lists above to ``RULES``."""
    for line in filter(None, _SENTENCES.splitlines()):
        rule, template = line.split(": ", 1)
        RULES.setdefault(rule, []).append(_alt(template))
    scene = cause = ""
    for line in filter(None, _TROUBLES.splitlines()):
        if line.startswith("["):
            scene, cause = line.strip("[]").split()
            continue
        rule, template = line.split(": ", 1)
        if rule == "cause":
            RULES.setdefault(f"cause.{scene}", []).append(_alt(template, cause=cause))
        else:
            RULES.setdefault(f"{rule}.{cause}", []).append(_alt(template))


def _favour_first() -> None:
    """Doubles the first weight where all are equal: greedy decoding then has a clear favourite."""
    for alternatives in RULES.values():
        if len(alternatives) > 1 and len({alt.weight for alt in alternatives}) == 1:
            alternatives[0] = replace(alternatives[0], weight=2 * alternatives[0].weight)


_add_rules()
_favour_first()


def _resolve(slot: Slot, env: Mapping[str, str]) -> tuple[str, list[Alternative]] | str:
    """The rule that a slot expands, or the text of the variable that it repeats."""
    key = slot.name if slot.selector is None else f"{slot.name}.{env[slot.selector]}"
    return (key, RULES[key]) if key in RULES else env[slot.name]


def _log_weight(alternatives: list[Alternative], index: int) -> float:
    return math.log(alternatives[index].weight / sum(alt.weight for alt in alternatives))


def generate(rng: random.Random) -> Story:
    """Draws a story; the same state of ``rng`` gives the same story."""
    env: dict[str, str] = {}
    text: list[str] = []
    derivation: list[tuple[str, int]] = []
    log_prob = 0.0
    stack: list[Symbol] = [Slot(START)]
    while stack:
        symbol = stack.pop()
        if isinstance(symbol, str):
            text.append(symbol)
            continue
        target = _resolve(symbol, env)
        if isinstance(target, str):
            text.append(target)
            continue
        rule, alternatives = target
        index = rng.choices(range(len(alternatives)), [alt.weight for alt in alternatives])[0]
        derivation.append((rule, index))
        log_prob += _log_weight(alternatives, index)
        env.update(alternatives[index].sets)
        stack.extend(reversed(alternatives[index].symbols))
    return Story("".join(text).removesuffix(END), log_prob, tuple(derivation))


class _State(NamedTuple):
    """A partial derivation of the parser: ``rest`` is left to match, the next symbol last."""

    pos: int
    rest: tuple[Symbol, ...]
    env: Mapping[str, str]
    log_prob: float = 0.0
    derivation: tuple[tuple[str, int], ...] = ()


@dataclass
class _Search:
    """What the search found: whole derivations, a viable one, and the furthest mismatch."""

    complete: list[_State] = field(default_factory=list)
    viable: bool = False
    offset: int = 0
    expected: str = ""


def _search(text: str) -> _Search:
    """Follows every derivation that agrees with ``text``; none is pruned, so all are counted."""
    found = _Search()
    agenda = [_State(0, (Slot(START),), {})]
    while agenda:
        state = agenda.pop()
        if not state.rest:
            if state.pos == len(text):
                found.complete.append(state)
            elif state.pos >= found.offset:
                found.offset, found.expected = state.pos, "the end of the text"
            continue
        symbol, rest = state.rest[-1], state.rest[:-1]
        target = symbol if isinstance(symbol, str) else _resolve(symbol, state.env)
        if isinstance(target, str):
            if text.startswith(target, state.pos):
                agenda.append(state._replace(pos=state.pos + len(target), rest=rest))
                continue
            tail = text[state.pos :]
            if target.startswith(tail):
                found.viable = True
                continue
            same = next(i for i, (a, b) in enumerate(zip(target, tail, strict=False)) if a != b)
            if state.pos + same >= found.offset:
                found.offset, found.expected = state.pos + same, repr(target[same:])
            continue
        rule, alternatives = target
        for index, alt in enumerate(alternatives):
            agenda.append(
                _State(
                    state.pos,
                    rest + alt.symbols[::-1],
                    {**state.env, **alt.sets} if alt.sets else state.env,
                    state.log_prob + _log_weight(alternatives, index),
                    (*state.derivation, (rule, index)),
                )
            )
    return found


def parse(text: str, complete: bool) -> ParseResult:
    """Checks a text against the grammar.

    Args:
        text: The text, without any end marker.
        complete: True to accept whole stories only; False to accept any beginning of a story,
            also one that stops inside a word.

    Returns:
        The result, with the derivation and its log probability for a whole story.

    Raises:
        RuntimeError: The text has several derivations (``check_grammar`` rules this out).
    """
    if END in text:
        return ParseResult(False, "the text contains the end marker", text.index(END))
    found = _search(text + END if complete else text)
    if not complete and (found.viable or found.complete):
        return ParseResult(True, "", len(text))
    if complete and len(found.complete) > 1:
        raise RuntimeError(f"the story has {len(found.complete)} derivations: {text!r}")
    if complete and found.complete:
        state = found.complete[0]
        return ParseResult(True, "", len(text), state.log_prob, state.derivation)
    if complete and found.viable:
        return ParseResult(False, "the story is not finished", len(text))
    expected = found.expected.replace(END, "<end>")
    got = text[found.offset : found.offset + 24]
    return ParseResult(
        False, f"expected {expected} at offset {found.offset}, got {got!r}", found.offset
    )


# A text that an alternative can begin with: literals and variable slots up to the first choice.
_Lead = tuple[Symbol, ...]


def _leads(
    symbols: tuple[Symbol, ...], bound: Mapping[str, str]
) -> Iterator[tuple[_Lead, Mapping[str, str], bool]]:
    """Yields (lead, bindings, whether the lead is the whole text of ``symbols``)."""
    lead: list[Symbol] = []
    for at, symbol in enumerate(symbols):
        if isinstance(symbol, str):
            lead.append(symbol)
            continue
        if symbol.selector is None and symbol.name not in RULES:
            lead.append(bound.get(symbol.name, symbol))
            continue
        if any(isinstance(item, Slot) or item.strip() for item in lead):
            yield tuple(lead), bound, False
            return
        for alt in _candidates(symbol):
            for inner, inner_bound, whole in _leads(alt.symbols, {**bound, **alt.sets}):
                if not whole:
                    yield (*lead, *inner), inner_bound, False
                    continue
                for more, more_bound, rest in _leads(symbols[at + 1 :], inner_bound):
                    yield (*lead, *inner, *more), more_bound, rest
        return
    yield tuple(lead), bound, True


def _candidates(slot: Slot) -> list[Alternative]:
    """The alternatives that a rule slot may expand, whatever its selector is bound to."""
    if slot.selector is None:
        return RULES[slot.name]
    return [
        alt for value in sorted(_values(slot.selector)) for alt in RULES[f"{slot.name}.{value}"]
    ]


def _values(variable: str) -> set[str]:
    return {alt.sets[variable] for alts in RULES.values() for alt in alts if variable in alt.sets}


def _differ(a: _Lead, b: _Lead) -> bool:
    """True if the two leads differ, for all values of their variables, before either one ends."""
    if not a or not b:
        return False
    x, y = a[0], b[0]
    if isinstance(x, Slot):
        if x == y:
            return _differ(a[1:], b[1:])
        return all(_differ((value, *a[1:]), b) for value in _values(x.name))
    if isinstance(y, Slot):
        return _differ(b, a)
    shared = min(len(x), len(y))
    if x[:shared] != y[:shared]:
        return True
    return _differ(
        (x[shared:], *a[1:]) if x[shared:] else a[1:],
        (y[shared:], *b[1:]) if y[shared:] else b[1:],
    )


def check_grammar() -> list[str]:
    """Returns what is wrong with the grammar; empty if it is well formed and unambiguous."""
    problems: list[str] = []
    for rule, alternatives in RULES.items():
        for alt in alternatives:
            problems += [f"{name} is a rule and a variable" for name in alt.sets if name in RULES]
            for symbol in alt.symbols:
                if isinstance(symbol, str):
                    continue
                if symbol.selector is None:
                    if symbol.name not in RULES and not _values(symbol.name):
                        problems.append(f"{rule}: nothing is called {symbol.name}")
                    continue
                for value in sorted(_values(symbol.selector)):
                    if f"{symbol.name}.{value}" not in RULES:
                        problems.append(f"{rule}: no rule {symbol.name}.{value}")
    if problems:
        return problems
    for rule, alternatives in RULES.items():
        leads = [[lead for lead, _, _ in _leads(alt.symbols, alt.sets)] for alt in alternatives]
        for i, first in enumerate(leads):
            for second in leads[:i]:
                problems += [
                    f"{rule}: {a} and {b} may begin alike"
                    for a in first
                    for b in second
                    if not _differ(a, b)
                ]
    return problems


def main() -> None:
    """Prints stories."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1, help="number of stories to print")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first story")
    args = parser.parse_args()
    for seed in range(args.seed, args.seed + args.count):
        story = generate(random.Random(seed))
        print(f"{story.text}\n\n[seed {seed}, log probability {story.log_prob:.2f}]\n")


if __name__ == "__main__":
    main()
