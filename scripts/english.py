"""General-looking English, made from a few hundred common words and a small grammar.

It gives the tokenizer pieces that ordinary English is made of, and the base model some practice
with text outside the small world.
"""

from __future__ import annotations

import random

ADJECTIVES = """
    able bad beautiful best better big black blue broken certain clear cold common complete dark
    dead deep different difficult early easy empty famous fast final fine first free full general
    good great green happy hard heavy high hot human important interesting large last late left
    light likely little local long low main modern national natural new next nice old only open
    other own particular political poor possible private public quick quiet ready real recent red
    rich right same serious short simple single small social special strong sure tall third true
    useful various warm white whole wide wild wrong young
""".split()
NOUNS = """
    account action age air amount animal answer area arm art article baby back ball bank bear bed
    bird blood board boat body book box boy brother building business car card case cat cell center
    chair chance change child church city class coat college company computer country county couple
    course court cup day death difference dog door earth effect end energy event example experience
    eye face fact family farm father field film fire fish floor flower food foot force form friend
    front game garden girl glass gold government grass ground group guitar hair hand head health
    heart history home horse hospital hour house husband idea information interest island job key
    kind king lake land language law leg letter level life light line list machine man market
    meaning meat meeting method mind minute money month moon mother mountain mouth movie music name
    nature news night number office oil order page paper park part party pattern people period
    person phone picture piece place plan plant player point police power president price problem
    product program project question race rain reason record report result river road rock room
    rule school science sea seat season sentence service shirt shop side sign sister site size
    skin sky snow society song sound source space sport stage star state station step stone store
    story street student subject summer sun system table teacher team term test text thing thought
    time title town train tree trip truth type use value view village voice war watch water way
    week wife wind window winter woman wood word work world writer year
""".split()
VERBS = """
    ask become believe bring build buy call carry catch change choose close come consider contain
    continue cover create cut decide describe draw drink drive eat explain fall feel find follow
    forget get give go happen hear help hold include join keep know lead learn leave let like live
    look lose love make mean meet move need offer open pay play produce provide put reach read
    receive remain remember require return run say see seem sell send serve set show sing sit sleep
    speak spend stand start stop study suggest take talk teach tell think travel try turn
    understand use visit wait walk want watch win wonder work write
""".split()
PAST = """
    added asked became began believed brought built called came carried changed created died
    discovered ended fell felt finished followed found gave happened heard held helped included
    invented joined kept killed knew learned left liked lived looked lost loved made married meant
    met moved needed opened ordered paid played produced provided published put ran reached read
    received released returned said sat saw seemed sent served showed sold spoke started stopped
    took thought told traveled tried turned used visited waited walked wanted watched went won
    worked wrote
""".split()
GERUNDS = """
    being building carrying coming doing driving eating following getting giving going having
    holding jumping leaving looking making moving opening playing reading riding running saying
    sitting sleeping smiling standing taking talking trying using waiting walking watching wearing
    working writing
""".split()
ADVERBS = """
    again almost also already always away even ever far finally here however just maybe more most
    much never now often once only perhaps quickly rather really several slowly sometimes soon
    still then there together too usually very well yesterday yet
""".split()
PREPOSITIONS = """
    about above across after against along among around as at before behind below between by
    during for from in inside into near of off on out over since through to toward under until
    up upon with within without
""".split()
DETERMINERS = """
    the the the the the the a a a an another any both each every few her his its many more my no
    one our some such that their these this those two three your
""".split()
PRONOUNS = "he she it they we you I everyone someone nobody who which him her them us".split()
NAMES = """
    Adam Alice America American Asia August Bill Bob Brown Canada Charles China Chris Daniel
    December England Europe France Frank French George German Germany Green Henry India Indian
    Italy Jack James Jane January Jim Joe John July June Kate King London Lucy March Maria Mark
    Martin Mary Michael Mike New North Paris Paul Peter Richard Robert Russia Sam San Smith South
    Spain Steve Susan Texas United University Washington West White William York
""".split()
LINKS = """
    and but or because if when while so that although as than where how why what
""".split()
AUXILIARIES = """
    is are was were be been has have had do does did can could will would should may might must
    is not are not was not do not does not did not
""".split()
QUESTION_OPENINGS = (
    "What is", "What are", "What was", "What does", "What kind of", "Who is", "Who was", "Where is",
    "Where can I find", "When did", "When was", "Why do", "Why is", "Why does", "How do I",
    "How can I", "How does", "How many", "How much", "How long", "Which", "Is it true that",
    "Is there", "Are there", "Can you", "Would you say that", "Do you think that", "Does",
)  # fmt: skip
SYLLABLE_STARTS = """
    b c d f g h j k l m n p r s t v w y z bl br ch cl cr dr fl fr gr pl pr qu sc sh sl sp st str
    th tr wh
""".split()
SYLLABLE_MIDDLES = "a e i o u a e i o ai ea ee ie oa oo ou ow ay".split()
SYLLABLE_ENDS = "   b ck d g l ll m n n nd ng nt p r r s ss st t t x".split(" ")
SUFFIXES = """
    able al ally an ance ant ary ate ated ation ed ence ent er ers es est ful ian ible ic ical ies
    ing ing ion ious ish ism ist ity ive ize less ly ly ment ness or ous s s s tion ture y
""".split()


def made_up_word(rng: random.Random) -> str:
    """A word that looks English and usually is not."""
    word = "".join(
        rng.choice(SYLLABLE_STARTS) + rng.choice(SYLLABLE_MIDDLES) + rng.choice(SYLLABLE_ENDS)
        for _ in range(rng.choice((1, 1, 2)))
    )
    return word + rng.choice(SUFFIXES) if rng.random() < 0.4 else word


def _noun_phrase(rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.15:
        return [rng.choice(PRONOUNS)]
    if kind < 0.3:
        names = [rng.choice(NAMES) for _ in range(rng.choice((1, 1, 2)))]
        return [*names, made_up_word(rng).capitalize()] if rng.random() < 0.2 else names
    noun = rng.choice(NOUNS)
    if rng.random() < 0.2:
        noun = made_up_word(rng)
    if rng.random() < 0.25:
        noun += "s"
    adjectives = [rng.choice(ADJECTIVES)] if rng.random() < 0.4 else []
    return [rng.choice(DETERMINERS), *adjectives, noun]


def _clause(rng: random.Random) -> list[str]:
    kind = rng.random()
    if kind < 0.5:
        verb = [rng.choice(PAST)]
    elif kind < 0.7:
        verb = [rng.choice(("is", "are", "was", "were")), rng.choice(GERUNDS)]
    elif kind < 0.85:
        verb = [*rng.choice(AUXILIARIES).split(), rng.choice(VERBS)]
    else:
        verb = [rng.choice(("is", "was", "are", "were")), rng.choice(ADJECTIVES)]
    if rng.random() < 0.2:
        verb.insert(0, rng.choice(ADVERBS))
    words = _noun_phrase(rng) + verb
    if rng.random() < 0.7:
        words += _noun_phrase(rng)
    if rng.random() < 0.5:
        words += [rng.choice(PREPOSITIONS), *_noun_phrase(rng)]
    return words


def statement(rng: random.Random) -> str:
    """One or two clauses, with commas, a capital and a full stop."""
    words = _clause(rng)
    kind = rng.random()
    if kind < 0.2:
        words[-1] += ","
        words += [rng.choice(LINKS), *_clause(rng)]
    elif kind < 0.3:
        words = [rng.choice(ADVERBS) + ",", *words]
    elif kind < 0.4:
        words = [rng.choice(("In", "After", "During", "At")), *_noun_phrase(rng)]
        words[-1] += ","
        words += _clause(rng)
    text = " ".join(words)
    return text[0].upper() + text[1:] + rng.choice("......!")


def question(rng: random.Random) -> str:
    """A question: an opening, a noun phrase and perhaps more."""
    words = [rng.choice(QUESTION_OPENINGS), *_noun_phrase(rng)]
    if rng.random() < 0.6:
        words += [rng.choice(VERBS), *_noun_phrase(rng)]
    if rng.random() < 0.4:
        words += [rng.choice(PREPOSITIONS), *_noun_phrase(rng)]
    return " ".join(words) + "?"


def any_word(rng: random.Random) -> str:
    """A common word of any kind."""
    return rng.choice(rng.choice((ADJECTIVES, NOUNS, NOUNS, VERBS, PAST, GERUNDS, ADVERBS, NAMES)))
