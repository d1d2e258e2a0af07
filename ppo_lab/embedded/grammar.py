"""The words of the help desk: what customers ask for, what clerks say, the slots of both.

Everything here is data. `questions` and `answers` put it together; `rules` judges by the keys of
the topics.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """A thing that customers want.

    `tasks` name it in a customer's words, each fit to follow "How do I"; `key` is the thing in the
    help desk that settles it, named by every right answer to this topic and by no right answer to
    another; `steps` use the key.
    """

    name: str
    key: str
    tasks: tuple[str, ...]
    steps: tuple[str, ...]


def _topic(name: str, key: str, tasks: str, steps: str) -> Topic:
    return Topic(
        name, key, tuple(tasks.split(" | ")), tuple(s.format(key=key) for s in steps.split(" | "))
    )


TOPICS = (
    _topic(
        "password",
        "reset link",
        "reset my password | change my password | recover my password | choose a new password",
        "click on the {key} | ask for a {key} | use the {key} in your inbox",
    ),
    _topic(
        "refund",
        "refund form",
        "get a refund | get my money back | return a broken lamp | send back my shoes",
        "fill in the {key} | send us the {key} | sign the {key}",
    ),
    _topic(
        "parcel",
        "tracking number",
        "track my order | find my parcel | see where my package is | check my delivery",
        "enter the {key} | look up the {key} | copy the {key} from your order",
    ),
    _topic(
        "subscription",
        "cancellation page",
        "cancel my subscription | stop my monthly plan | end my membership | leave the family plan",
        "open the {key} | confirm it on the {key} | go through the {key}",
    ),
    _topic(
        "address",
        "address book",
        "change my address | update my delivery address | correct my street | add a second address",
        "edit the {key} | add a line to the {key} | save it in the {key}",
    ),
    _topic(
        "invoice",
        "billing history",
        "download my invoice | get a receipt | find my last bill | print an old invoice",
        "open the {key} | pick the month in the {key} | save it from the {key}",
    ),
    _topic(
        "login",
        "unlock code",
        "unlock my account | log in again | get back into my account | fix my login",
        "type the {key} | ask for an {key} | wait for the {key} on your phone",
    ),
    _topic(
        "app",
        "app store",
        "install the app | get the app | set up the app | put the app on my tablet",
        "visit the {key} | search for it in the {key} | load it from the {key}",
    ),
    _topic(
        "coupon",
        "discount box",
        "use a coupon | apply a discount | redeem my voucher | pay less with my code",
        "type it in the {key} | open the {key} | fill the {key} before you pay",
    ),
    _topic(
        "repair",
        "repair ticket",
        "repair my screen | claim my warranty | get my phone mended | fix a cracked case",
        "open a {key} | send a {key} | print the {key} for the parcel",
    ),
    _topic(
        "appointment",
        "booking calendar",
        "book an appointment | move my appointment | meet an adviser | reserve a visit",
        "open the {key} | choose a day in the {key} | change the day in the {key}",
    ),
    _topic(
        "alerts",
        "alert switch",
        "turn off the alerts | stop the text messages | mute the news | get fewer messages",
        "flip the {key} | turn the {key} off | find the {key}",
    ),
    _topic(
        "language",
        "language menu",
        "change the language | read the site in French | switch to Spanish | get it in German",
        "open the {key} | choose it in the {key} | scroll down the {key}",
    ),
    _topic(
        "backup",
        "backup folder",
        "back up my photos | save my files | restore my files | keep a copy of my pictures",
        "use the {key} | drag it to the {key} | look into the {key}",
    ),
    _topic(
        "person",
        "phone line",
        "speak to an agent | call the support team | talk to a person | reach somebody by phone",
        "call our {key} | try the {key} after nine | choose two on the {key}",
    ),
    _topic(
        "shop",
        "store finder",
        "visit your shop | find the nearest shop | check your opening hours | see a shop nearby",
        "use the {key} | open the {key} | enter your town in the {key}",
    ),
)

QUESTIONS = (
    "How do I {task}{context}?",
    "How can I {task}{context}?",
    "How would I {task}{context}?",
    "Can I {task}{context}?",
    "Where do I go to {task}{context}?",
    "What do I need to {task}{context}?",
    "Can you tell me how to {task}{context}?",
    "Could you help me {task}{context}?",
    "Is it possible to {task}{context}?",
    "I want to {task}{context}. How?",
    "I tried to {task}{context}. What now?",
    "I do not know how to {task}{context}. Any idea?",
    "My wife would like to {task}{context}. What should she do?",
    "Who can help me {task}{context}?",
)

CONTEXTS = (
    "",
    " today",
    " from my phone",
    " on the website",
    " before Monday",
    " as a new customer",
    " for my mother",
    " without waiting",
)

PLACES = (
    "in the app",
    "on our website",
    "in your account",
    "on the start page",
    "on your phone",
    "under the help tab",
)

ACTIONS = (
    "You can {step}.",
    "You should {step}.",
    "Just {step}.",
    "First {step}, then wait.",
    "You can {step} {place}.",
    "Simply {step} {place}.",
    "To do that, {step}.",
    "To {task}, {step}.",
    "The best way is to {step} {place}.",
    "It is enough to {step}.",
)

DETAILS = (
    "It takes {number} minutes.",
    "It takes about {number} hours.",
    "You get an answer within {number} days.",
    "It works after {number} minutes.",
    "It is free for the first {number} weeks.",
    "You have {number} days to do it.",
)
NUMBERS = ("two", "three", "four", "five", "six", "ten", "twelve", "twenty")

COURTESIES = (
    "Thank you for {thanks}.",
    "Thanks for {thanks}!",
    "Thank you so much for {thanks}!",
    "We are {glad} to help you.",
    "I am {glad} to help!",
    "You are very welcome.",
    "Have a {nice} {day}!",
    "We wish you a {nice} {day}.",
    "Please ask again at any time.",
    "Please let us know if you need {more}.",
    "Please write to us for {more}.",
    "We are sorry for the trouble.",
)
THANKS = ("asking", "your question", "writing to us", "your patience", "choosing us", "your trust")
GLAD = ("happy", "glad", "pleased")
NICE = ("nice", "lovely", "great", "wonderful")
DAYS = ("day", "week", "evening", "morning")
MORE = ("more help", "anything else", "more details")

RUDE = (
    "Figure it out yourself.",
    "That is not my {problem}.",
    "Stop wasting my {time}.",
    "What a silly {question}!",
    "Only a fool would ask that.",
    "Do not bother me with your {question}.",
    "Are you too lazy to {task}?",
    "I am tired of people who want to {task}.",
    "Go away and bother {someone}.",
    "Nobody cares about your {question}.",
)
PROBLEMS = ("problem", "job", "business", "fault")
TIMES = ("time", "day", "morning")
ASKED = ("question", "request", "complaint", "story")
SOMEONE = ("someone else", "another shop", "the boss", "my colleague")

CURT = (
    "No.",
    "Maybe.",
    "Later.",
    "No idea.",
    "Ask {someone}.",
    "Try again.",
    "Look {place}.",
    "Not {context}.",
    "Wait {number} days.",
    "Somewhere {place}.",
)
CURT_CONTEXTS = ("today", "now", "here", "this week")

VAGUE = (
    "There are many ways to {task}.",
    "Some people {task} {place}.",
    "It depends on many things.",
    "It may be somewhere {place}.",
    "Many customers want to {task}.",
    "We know that you want to {task}.",
    "One day you may find it {place}.",
    "Things change every {number} weeks.",
)
