"""Answers of VQA: their normal form, the vocabulary of labels, and the scores (the rules of the VQA challenge)."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

ANNOTATORS = 10
SCORES = (0.0, 0.3, 0.6, 0.9)  # of an answer that 0, 1, 2, 3 of ten people gave; 1 for more

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")  # sic: the look-behind is mistyped, and so are the published answers
COMMA_IN_NUMBER = re.compile(r"(\d)(\,)(\d)")
ARTICLES = {"a", "an", "the"}
NUMBER_WORDS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
CONTRACTION_PAIRS = """
    aint=ain't arent=aren't cant=can't couldve=could've couldnt=couldn't couldn'tve=couldn't've
    couldnt've=couldn't've didnt=didn't doesnt=doesn't dont=don't hadnt=hadn't hadnt've=hadn't've hadn'tve=hadn't've
    hasnt=hasn't havent=haven't hed=he'd hed've=he'd've he'dve=he'd've hes=he's howd=how'd howll=how'll hows=how's
    Id've=I'd've I'dve=I'd've Im=I'm Ive=I've isnt=isn't itd=it'd itd've=it'd've it'dve=it'd've itll=it'll
    let's=let's maam=ma'am mightnt=mightn't mightnt've=mightn't've mightn'tve=mightn't've mightve=might've
    mustnt=mustn't mustve=must've neednt=needn't notve=not've oclock=o'clock oughtnt=oughtn't ow's'at='ow's'at
    'ows'at='ow's'at 'ow'sat='ow's'at shant=shan't shed've=she'd've she'dve=she'd've she's=she's shouldve=should've
    shouldnt=shouldn't shouldnt've=shouldn't've shouldn'tve=shouldn't've somebody'd=somebodyd
    somebodyd've=somebody'd've somebody'dve=somebody'd've somebodyll=somebody'll somebodys=somebody's
    someoned=someone'd someoned've=someone'd've someone'dve=someone'd've someonell=someone'll someones=someone's
    somethingd=something'd somethingd've=something'd've something'dve=something'd've somethingll=something'll
    thats=that's thered=there'd thered've=there'd've there'dve=there'd've therere=there're theres=there's
    theyd=they'd theyd've=they'd've they'dve=they'd've theyll=they'll theyre=they're theyve=they've twas='twas
    wasnt=wasn't wed've=we'd've we'dve=we'd've weve=we've werent=weren't whatll=what'll whatre=what're whats=what's
    whatve=what've whens=when's whered=where'd wheres=where's whereve=where've whod=who'd whod've=who'd've
    who'dve=who'd've wholl=who'll whos=who's whove=who've whyll=why'll whyre=why're whys=why's wont=won't
    wouldve=would've wouldnt=wouldn't wouldnt've=wouldn't've wouldn'tve=wouldn't've yall=y'all yall'll=y'all'll
    y'allll=y'all'll yall'd've=y'all'd've y'alld've=y'all'd've y'all'dve=y'all'd've youd=you'd youd've=you'd've
    you'dve=you'd've youll=you'll youre=you're youve=you've
"""
CONTRACTIONS = dict(pair.split("=") for pair in CONTRACTION_PAIRS.split())


def normalise_answer(answer: str) -> str:
    """The form in which answers are compared: no punctuation, no articles, digits for number words, lower case."""
    text = answer
    number_with_comma = COMMA_IN_NUMBER.search(answer) is not None
    for mark in PUNCTUATION:
        at_word_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if at_word_edge or number_with_comma else " ")
    words = PERIOD.sub("", text).lower().split()
    words = [NUMBER_WORDS.get(word, word) for word in words]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def build_vocabulary(answers: Iterable[str], min_occurrences: int) -> list[str]:
    """The answers that occur at least `min_occurrences` times, in the order of their first appearance: label order."""
    return [answer for answer, count in Counter(answers).items() if count >= min_occurrences]


def score(count: float) -> float:
    """The score of an answer that `count` of ten people gave."""
    return SCORES[int(count)] if count < len(SCORES) else 1.0


def label_answers(answers: Sequence[str], label_of: Mapping[str, int]) -> tuple[list[str], list[int], list[float]]:
    """The different answers that have a label, their labels and scores, in the order of first appearance.

    One answer a person. The official ten count as they are; fewer people (or more) are scaled to ten, so that the
    answer of a single annotator scores 1.
    """
    counts = Counter(answers)
    known = [answer for answer in counts if answer in label_of]
    labels = [label_of[answer] for answer in known]
    return known, labels, [score(round(counts[answer] * ANNOTATORS / len(answers))) for answer in known]
