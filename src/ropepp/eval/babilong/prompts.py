"""The prompts of BABILong (arXiv 2406.10149; github.com/booydar/babilong, Apache-2.0), as there.

Odd spellings, marks and line ends are the original's: results are comparable only with them.
"""
# ruff: noqa: RUF001 (quotation marks of the original)

from dataclasses import dataclass

TEMPLATE = (
    "{instruction}\n\n{examples}\n\n{post_prompt}\n\n<context>\n{context}\n</context>\n\n"
    "Question: {question}"
)


@dataclass(frozen=True)
class Prompt:
    """What stands around the context and the question of a task."""

    instruction: str
    examples: str
    post_prompt: str

    def text(self, context: str, question: str) -> str:
        """All that the model reads."""
        return TEMPLATE.format(
            instruction=self.instruction,
            examples=self.examples,
            post_prompt=self.post_prompt,
            context=context.strip(),
            question=question,
        ).strip()


def _examples(*told: str, between: str = "\n", end: str = "") -> str:
    """In turn, facts with their question and an answer."""
    pairs = zip(told[::2], told[1::2], strict=True)
    return between.join(f"<example>\n{a}\nAnswer: {b}\n</example>" for a, b in pairs) + end


_FACTS_ONLY = "You need to answer the question based only on the information from the facts."
_ITEMS = (
    "If a person got an item in the first location and travelled to the second location the item "
    "is also in the second location. If a person dropped an item in the first location and moved "
    "to the second location the item remains in the first location."
)
_LOCATIONS = (
    "I will give you context with the facts about people and their locations hidden in some random "
    f"text and a question. {_FACTS_ONLY} If a person was in different locations, use the latest "
    "location the person was in to answer the question."
)
_CARRIED = (
    "I will give you context with the facts about people and objects they carry, hidden in some "
    f"random text and a question. {_FACTS_ONLY}"
)
_NOTHING_AFTER = "Do not write anything else after that."
_NO_EXPLANATION = "Do not explain your answer."

PROMPTS = {
    "qa1": Prompt(
        "I will give you context with the facts about positions of different persons hidden in "
        f"some random text and a question. {_FACTS_ONLY} If a person was in different locations, "
        "use the latest location to answer the question.",
        _examples(
            "Charlie went to the hallway. Judith come back to the kitchen. Charlie travelled to "
            "balcony. Where is Charlie?",
            "The most recent location of Charlie is balcony.",
            "Alan moved to the garage. Charlie went to the beach. Alan went to the shop. Rouse "
            "travelled to balcony. Where is Alan?",
            "The most recent location of Alan is shop.",
            between="\n\n",
        ),
        "Always return your answer in the following format: The most recent location of ’person’ "
        f"is ’location’. {_NOTHING_AFTER}",
    ),
    "qa2": Prompt(
        "I give you context with the facts about locations and actions of different persons "
        f"hidden in some random text and a question.{_FACTS_ONLY}\n{_ITEMS}",
        _examples(
            "Charlie went to the kitchen. Charlie got a bottle. Charlie moved to the balcony. "
            "Where is the bottle?",
            "The bottle is in the balcony.",
            "Alan moved to the garage. Alan got a screw driver. Alan moved to the kitchen. Where "
            "is the screw driver?",
            "The screw driver is in the kitchen.",
        ),
        "Always return your answer in the following format: The ’item’ is in ’location’. "
        f"{_NOTHING_AFTER}",
    ),
    "qa3": Prompt(
        "I give you context with the facts about locations and actions of different persons "
        f"hidden in some random text and a question. {_FACTS_ONLY}\n{_ITEMS}",
        _examples(
            "John journeyed to the bedroom. Mary grabbed the apple. Mary went back to the "
            "bathroom. Daniel journeyed to the bedroom. Daniel moved to the garden. Mary travelled "
            "to the kitchen. Where was the apple before the kitchen?",
            "Before the kitchen the apple was in the bathroom.",
            "John went back to the bedroom. John went back to the garden. John went back to the "
            "kitchen. Sandra took the football. Sandra travelled to the garden. Sandra journeyed "
            "to the bedroom. Where was the football before the bedroom?",
            "Before the bedroom the football was in the garden.",
        ),
        "Always return your answer in the following format: Before the $location_1$ the $item$ was "
        f"in the $location_2$. {_NOTHING_AFTER}",
    ),
    "qa4": Prompt(
        "I will give you context with the facts about different people, their location and "
        f"actions, hidden in some random text and a question. {_FACTS_ONLY}",
        _examples(
            "The hallway is south of the kitchen. The bedroom is north of the kitchen. What is "
            "the kitchen south of?",
            "bedroom",
            "The garden is west of the bedroom. The bedroom is west of the kitchen. What is west "
            "of the bedroom?",
            "garden",
        ),
        f"Your answer should contain only one word - location. {_NOTHING_AFTER}",
    ),
    "qa5": Prompt(
        "I will give you context with the facts about locations and their relations hidden in "
        f"some random text and a question. {_FACTS_ONLY}",
        _examples(
            "Mary picked up the apple there. Mary gave the apple to Fred. Mary moved to the "
            "bedroom. Bill took the milk there. Who did Mary give the apple to?",
            "Fred",
            "Jeff took the football there. Jeff passed the football to Fred. Jeff got the milk "
            "there. Bill travelled to the bedroom. Who gave the football?",
            "Jeff",
            "Fred picked up the apple there. Fred handed the apple to Bill. Bill journeyed to the "
            "bedroom. Jeff went back to the garden. What did Fred give to Bill?",
            "apple",
        ),
        f"Your answer should contain only one word. {_NOTHING_AFTER} {_NO_EXPLANATION}",
    ),
    "qa6": Prompt(
        _LOCATIONS,
        _examples(
            "John travelled to the hallway. John travelled to the garden. Is John in the garden?",
            "yes",
            "Mary went to the office. Daniel journeyed to the hallway. Mary went to the bedroom. "
            "Sandra went to the garden. Is Mary in the office?",
            "no",
            end="\n",
        ),
        f"Your answer should contain only one word - $yes$ or $no$. {_NOTHING_AFTER} "
        f"{_NO_EXPLANATION}",
    ),
    "qa7": Prompt(
        _CARRIED,
        _examples(
            "Daniel went to the bedroom. Daniel got the apple there. How many objects is Daniel "
            "carrying?",
            "one",
            "Mary grabbed the apple there. Mary gave the apple to John. How many objects is Mary "
            "carrying?",
            "none",
            "Sandra travelled to the hallway. Sandra picked up the milk there. Sandra took the "
            "apple there. Mary travelled to the garden. How many objects is Sandra carrying?",
            "two",
            end="\n",
        ),
        f"Your answer should contain only one word - $none$ or $number_of_objects$. "
        f"{_NOTHING_AFTER} {_NO_EXPLANATION}",
    ),
    "qa8": Prompt(
        _CARRIED,
        _examples(
            "Sandra travelled to the garden. Mary grabbed the milk there. What is Mary carrying?",
            "milk",
            "Mary travelled to the kitchen. Sandra travelled to the office. John travelled to the "
            "office. Sandra discarded the milk there. What is Sandra carrying?",
            "nothing",
            "Daniel grabbed the apple there. Mary went to the office. Daniel moved to the garden. "
            "Daniel grabbed the milk there. Mary went to the kitchen. What is Daniel carrying?",
            "apple,milk",
            end="\n",
        ),
        "Your answer should contain only one or two words: $nothing$ or $object$ or $object_1$, "
        f"$object_2$. Do not write anything else. {_NO_EXPLANATION}",
    ),
    "qa9": Prompt(
        _LOCATIONS,
        _examples(
            "John is not in the bathroom. Sandra is not in the bedroom. Is John in the bathroom?",
            "no",
            "Mary journeyed to the kitchen. John is in the bedroom. Sandra is not in the garden. "
            "Is Mary in the kitchen?",
            "yes",
            end="\n",
        ),
        "Your answer should contain only one word - $yes$ or $no$. Do not write anything else. "
        f"{_NO_EXPLANATION}",
    ),
    "qa10": Prompt(
        _LOCATIONS,
        _examples(
            "Bill is in the kitchen. Julie is either in the school or the cinema. Is Bill in the "
            "bedroom?",
            "no",
            "Fred is in the bedroom. Mary is either in the school or the cinema. Is Mary in the "
            "school?",
            "maybe",
            "Fred is either in the kitchen or the park. Bill moved to the cinema. Is Bill in the "
            "cinema?",
            "yes",
            end="\n<context>\n",
        ),
        "Your answer should contain only one word - $yes$ or $no$ or $maybe$. Do not write "
        f"anything else. {_NO_EXPLANATION}",
    ),
}
