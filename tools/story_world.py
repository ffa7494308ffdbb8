"""The world of the stories: who lives in it, what things there are, and what can happen.

Knows every word that `stories.py` can tell, and which words belong together (a squirrel climbs, an
owl flies, glue mends a cup). How the text below is read stands in `stories.py`.
"""

from __future__ import annotations

# By pronoun. A name that is a hero's is never a friend's.
HEROES = {
    "he": ("Ben", "Finn", "Hugo", "Leo", "Max", "Otto", "Sam", "Tom"),
    "she": ("Anna", "Daisy", "Ella", "Lily", "Mia", "Nell", "Rosa", "Zoe"),
}
FRIENDS = {
    "he": ("Barney", "Felix", "Oscar", "Paul", "Theo", "Walter"),
    "she": ("Bella", "Clara", "Greta", "Ivy", "Olga", "Wilma"),
}

# Columns that are drawn together -> the rows to draw from.
TABLES: dict[str, list[tuple[str, ...]] | list[str]] = {
    "hero he him his child": [
        *((name, "he", "him", "his", "boy") for name in HEROES["he"]),
        *((name, "she", "her", "her", "girl") for name in HEROES["she"]),
    ],
    "kind": ["{child}", "rabbit", "mouse", "fox", "hedgehog", "lamb", "puppy", "kitten", "piglet"],
    "trait": ["cheerful", "clever", "curious", "gentle", "lively", "merry", "quiet", "shy"],
    "friend fhe fhim fhis": [
        *((name, "he", "him", "his") for name in FRIENDS["he"]),
        *((name, "she", "her", "her") for name in FRIENDS["she"]),
    ],
    "fkind": ["bear", "beaver", "duck", "frog", "goat", "goose", "pony", "turtle"],
    "climber can did": [
        ("squirrel", "I can climb any tree", "ran up the trunk"),
        ("owl", "I can fly to the very top", "flew up to the branch"),
        ("giraffe", "I have a long neck", "stretched {fhis} neck up to the branch"),
        ("monkey", "I can swing from branch to branch", "swung up through the leaves"),
    ],
    "elder she": [
        *((name, "she") for name in ("mother", "grandmother")),
        *((name, "he") for name in ("father", "grandfather")),
    ],
    "home place at_place": [
        ("at the edge of a forest", "forest", "in the forest"),
        ("in a white house by the sea", "beach", "on the beach"),
        ("on a small farm", "meadow", "in the meadow"),
        ("in a village by the river", "river", "by the river"),
        ("in a town with a big park", "park", "in the park"),
        ("at the foot of a green hill", "hill", "on the hill"),
        ("in a cottage beside a lake", "lake", "by the lake"),
    ],
    "colour": ["red", "blue", "green", "yellow", "purple", "orange", "white", "pink"],
    "weather": ["sunny", "warm", "cold", "cloudy", "quiet", "bright"],
    "toy": ["ball", "bell", "boat", "book", "cup", "drum", "hat", "kite", "scarf", "wagon"],
    "light_toy": ["ball", "balloon", "hat", "kite", "scarf"],
    "food": ["pancakes", "apple pie", "warm soup", "bread and honey", "berry cake", "roasted nuts"],
    "furniture": ["bed", "table", "chair", "stairs"],
    "big_thing": ["door", "cupboard", "curtain", "old box"],
    "spot": [
        "in the tall grass",
        "under a bush",
        "behind a big stone",
        "next to an old fence",
        "between the roots of a tree",
        "under a pile of leaves",
    ],
    "thing broke tool mended": [
        ("chair", "a leg of the chair broke off", "a hammer and nails", "nailed the leg back on"),
        ("cup", "the handle of the cup broke off", "a pot of glue", "glued the handle back on"),
        ("blanket", "the blanket got a big hole", "a needle and thread", "sewed up the hole"),
        ("coat", "a button of the coat fell off", "a needle and thread", "sewed the button on"),
        ("kite", "the kite tore in two", "a roll of tape", "taped up the tear"),
        ("wagon", "a wheel of the wagon came off", "a long screw", "screwed the wheel back on"),
    ],
    "noise cause": [
        ("tap, tap, tap", "a branch that the wind blew against the window"),
        ("drip, drip, drip", "the rain that dripped into a bucket"),
        ("creak, creak", "the old gate that swung in the wind"),
        ("hoo, hoo", "an owl that sang to the moon"),
        ("buzz, buzz", "a fat bee that could not find its way out"),
    ],
    "monster": ["dragon", "ghost", "giant", "monster", "witch"],
    "dish missing helper": [
        ("honey cake", "honey", "bear"),
        ("carrot soup", "carrots", "goat"),
        ("apple pie", "apples", "pony"),
        ("cheese bread", "cheese", "mole"),
        ("berry jam", "berries", "deer"),
        ("nut bread", "nuts", "squirrel"),
    ],
    "shelter": [
        *("in a hollow tree", "in a small cave"),
        *("under a stone bridge", "under a wide leaf", "under an old boat"),
    ],
    "pastime": [
        "told each other funny stories",
        "sang all the songs they knew",
        "counted the drops that fell from above",
        "played a guessing game",
    ],
    "seed plant use": [
        ("pumpkin", "a big round pumpkin", "made a pot of soup"),
        ("sunflower", "a tall yellow sunflower", "gave its seeds to the birds"),
        ("melon", "a sweet green melon", "cut it into slices"),
        ("rose", "a lovely red rose", "put it in a vase on the table"),
        ("carrot", "a long orange carrot", "shared it for lunch"),
    ],
    "skill fail": [
        ("swim", "went under and came up with a wet nose"),
        ("ride a bicycle", "fell into the soft grass"),
        ("whistle", "blew and blew, but no sound came out"),
        ("dance", "tripped over {his} own feet"),
        ("play the flute", "made only a squeak"),
        ("skate", "slipped and sat down on the ice"),
    ],
    "flyer": ["butterfly", "dragonfly", "bumblebee", "feather"],
    "guide": [
        "We only have to follow the river",
        "The brightest star shows the way",
        "I can see the smoke from your chimney",
        "I know every path in this land",
    ],
    "treasure": ["gold ring", "silver key", "little purse", "old watch", "pearl necklace"],
    "owner oshe oher": [("woman", "she", "her"), ("man", "he", "his")],
    "why": [
        '"[What is the matter|Why are you so sad|Why are you crying], {hero}?" {fhe} asked.',
        '{Fhe} [saw {his} sad face|sat down beside {him}] and asked, "What has happened?"',
    ],
    "arrives": [
        "{friend} the {fkind} [came by|was passing by|came down the path].",
        "Then along came {friend} the {fkind}.",
        "{A_fkind} named {friend} [came by|was passing by].",
    ],
    "thanks": [
        '"Thank you, {friend}!" [said|cried] {hero}.',
        '{hero} gave {friend} a [big|warm] hug. "[You are so kind|How kind you are]," {he} said.',
        '"You are a true friend, {friend}," said {hero}.',
    ],
    "evening": [
        "They [played|laughed and played] together until the sun went down.",
        "That evening they ate {food} together.",
        "That night, {hero} went to bed with a smile.",
    ],
    "moral": [
        "From that day on, {hero} and {friend} were the best of friends.",
        "And {hero} never forgot how [good|fine] it is to have a friend.",
        "And whenever {hero} needed help, {friend} was there.",
    ],
    "closing": ["{evening}", "{moral}"],
    "opening": [
        "Once upon a time, there was a little {kind} named {hero}.",
        "Once upon a time, {a_trait} {kind} named {hero} lived {home}.",
        "Once upon a time, there was {a_trait} little {kind} named {hero}.",
        "There once was {a_trait} {kind} called {hero}.",
        "{hero} was a little {kind} who lived {home}.",
    ],
}

PLOTS = {
    "lost": """
{opening}
{He} had {a_colour} {toy} that {he} loved very much.
| {He} took {his} {colour} {toy} everywhere.
| The thing {he} loved most was {a_colour} {toy}.

One {weather} morning, the {toy} was gone.
| One {weather} day, {hero} could not find the {toy}.
{He} looked under the {furniture} and behind the {big_thing}, but it was not there.
| {He} looked behind the {big_thing}. No {toy}! {He} looked under the {furniture}. No {toy}!
{He} sat down and began to cry.
| "Where can it be?" {he} said, and a tear ran down {his} cheek.

{arrives} {why}
"I have lost my {colour} {toy}," said {hero}.
| "My {colour} {toy} is gone," said {hero}.
"Do not [worry|cry]," said {friend}. "[I will help you look|We will find it together]."
They went to the {place} and looked [everywhere|high and low].
Then {friend} saw something {colour} {spot}. "Look, {hero}!" {fhe} called. It was the {toy}!

{hero} [jumped for joy|laughed and clapped]. {thanks} {closing}
""",
    "stuck": """
{opening}
{He} had {a_colour} {light_toy}, and {he} was very proud of it.
| {He} took {his} {colour} {light_toy} everywhere.

One windy day, {hero} was playing {at_place}.
| One day, {hero} went to the {place} to play.
A strong wind took the {light_toy} and blew it up into a tall tree. "Oh no!" cried {hero}.
{He} jumped as high as {he} could, but the branch was too high.
| {He} shook the tree with all {his} might, but the {light_toy} did not come down.
| {He} threw a stick at it, but the stick got stuck too.

Just then, {friend} the {climber} came by. {why}
"My {colour} {light_toy} is in the tree," said {hero}, "and I cannot reach it."
"{can}," said {friend}. "[Wait here|Let me try|Just watch]." {Fhe} {did} and
 brought the {light_toy} down.

{thanks}
Then {friend} had a turn with the {light_toy} too.
|
{closing}
""",
    "broken": """
{opening} {His} {elder} had made {him} {a_colour} {thing}.
"Take good care of it," {she} said.
| It was the best present of all.
|

One {weather} day, {hero} was [playing too wildly|running much too fast|not careful], and {broke}.
"Oh dear," said {hero}. "What will {Elder} say?"
| {hero} was so sorry that {he} hid behind the {big_thing}.
| {hero} looked at the broken {thing} and wanted to cry.

{arrives} {why}
"I have broken my {colour} {thing}," said {hero}.
"That can be mended," said {friend}. {Fhe} [went home and came back with|took out] {tool}.
Together they {mended}. Soon the {thing} was as good as new.

In the evening, {hero} told {his} {elder} what had happened.
{Elder} was not angry. "I am glad that you told me the truth," {she} said.
| {Elder} smiled. "Things can break," {she} said, "but a good friend helps to mend them."
{moral}
""",
    "share": """
{opening} {His} best friend was {a_fkind} named {friend}.
They played together every day.
|

One {weather} day, they found {a_colour} {toy} {spot}.
"I saw it first!" [said|shouted] {hero}. "No, I saw it first!" [said|shouted] {friend}.
They pulled and pulled until they both fell down.
| They both held on to the {toy}, and neither let go.
Then {friend} went home without a word.

Now {hero} had the {colour} {toy} all to {him}self.
But it was no fun to play alone.
| But {he} felt sad and lonely.
{He} took the {toy} and went to see {friend}. "I am sorry," {he} said. "You can have it first."

{friend} [smiled|was very happy]. "I am sorry too," {fhe} said. "Let us take turns."
And so they did, and the {toy} was twice as much fun.
| They learned that sharing is better than winning.
{evening}
""",
    "noise": """
{opening}
{He} was not afraid of anything, or so {he} said.
| {He} did not like the dark.

One [dark|cold|windy] night, a strange sound woke {him}. "{Noise}!" it went.
{hero} pulled the blanket over {his} head.
| {hero} sat up in bed and listened.
"[Maybe it is|What if it is|I think it is] {a_monster}," {he} whispered. "{Noise}!" it went again.

"{Elder}, {Elder}!" called {hero}. {His} {elder} came in with a lamp.
"There is {a_monster} [in the house|outside]," said {hero}.
"Let us go and see," said {his} {elder}. [Hand in hand|Very slowly], they walked through the dark.
They opened the door, and what did they find? It was only {cause}.
| And there it was. It was not {a_monster} at all. It was {cause}.

{hero} laughed and laughed. "[What a silly {kind} I am|How silly of me]," {he} said.
After that, {he} was never afraid of the sound again.
| {He} went back to bed and slept until the sun came up.
| "Good night, little {kind}," said {his} {elder}, and put out the lamp.
""",
    "birthday": """
{opening}
Tomorrow was the birthday of {his} {elder}, and {hero} wanted to make {dish}.
| "Today is the birthday of my {elder}," said {hero}. "I will make {dish}."

{He} took a big bowl and a spoon and [began|set to work]. But {he} had no {missing}[| left].
"[What shall I do|What now]?" said {hero}. "I cannot make {dish} without {missing}."
{He} went to see {friend} the {helper}.
| Then {he} thought of {friend} the {helper} and ran to {fhis} house.
| {He} knocked on the door of {friend} the {helper}.
"Please, {friend}, do you have some {missing}?" {he} asked.
"I have plenty," said {friend}. "Take as much as you need."
| "Of course," said {friend}, and gave {him} a full basket.

They made the {dish} together, and it smelled wonderful.
| Soon the whole house smelled of {dish}.
"Happy birthday!" they called. {Elder} [clapped|was so surprised].
"This is the best {dish} I have ever eaten," {she} said.
| "You made this for me?" {she} said, and gave them both a kiss.
{moral}
""",
    "rain": """
{opening}

One day, {hero} was [walking|playing] {at_place}, far from home.
The sky grew dark, and big drops of rain began to fall.
| Black clouds came, and then it rained and rained.
{He} ran and hid {shelter}. There sat {friend} the {fkind}, who was [wet|cold] too.

Boom! went the thunder.
"I am afraid," said {hero}. "So am I," said {friend}, "but it is better with two."
| "Do not be afraid," said {friend}. "It is only a loud noise."
So they sat close together and {pastime}.
| To pass the time, they {pastime}.

At last the rain stopped and the sun came out. "Look, a rainbow!" [cried|called] {hero}.
They jumped in every puddle on the way home.
| {friend} walked home with {hero}, and they had {food} by the fire.
{moral}
""",
    "nest": """
{opening}

One {weather} morning, {he} heard a small voice {at_place}. "Peep, peep!" it said.
{hero} looked around and found a baby bird {spot}.
"I fell out of my nest," [said|cried] the baby bird. "I want my mother."
{hero} looked up. The nest was at the top of a tall tree, much too high for a little {kind}.

"Wait here," said {hero}. "I know who can help." {He} ran to {friend} the {climber}.
"Can you help?" {he} asked. "{can}," said {friend}.
{Fhe} took the baby bird, {did} and put it back in the nest.

Soon the mother bird came home. "Thank you both," she said. "I will sing for you every morning."
And every morning, {hero} woke up to the sweetest song.
| She sang so sweetly that {hero} and {friend} began to dance.
{moral}
""",
    "seed": """
{opening}
One {weather} day, {friend} the {fkind} gave {him} a tiny seed. "Plant it and wait," {fhe} said.
| One {weather} day, {friend} the {fkind} brought {him} a tiny {seed} seed. "It will be a surprise,"
 {fhe} said.

{hero} dug a hole, put the seed in and covered it with earth. Every day {he} gave it water.
But nothing [happened|came up]. "It will never grow," {he} told {friend}.
"Be patient," said {friend}. "Good things take time."
| "Every seed needs time to sleep first," said {friend}. "Wait a little."

The sun shone and the rain fell. Then one morning, there was a small green leaf!
It grew [and grew|a little every day], and at last it was {plant}.
"I grew it all by myself!" said {hero}. "With a little help from the sun," laughed {friend}.
| "It was worth the wait," said {hero}.
They {use}.
{closing}
""",
    "learn": """
{opening}
More than anything, {he} wanted to learn to {skill}.
| {He} could do many things, but {he} could not {skill}.

One {weather} day, {he} tried. {He} {fail}. {He} tried again, but it [did not help|was no better].
"I will never learn it," {he} [said|sighed].
| "It is too hard for a little {kind}," {he} [said|sighed].

{friend} the {fkind} [saw it|was watching]. "I could not {skill} at first," {fhe} said.
 "I will show you."
They practiced [every day|every morning]. On the first day, {hero} {fail}. On the second day,
 it went a little better. And on the third day, {hero} could {skill}!

"I can {skill}!" {he} shouted. "I knew you could do it," said {friend}.
{hero} ran home to show {his} {elder}, who was very proud of {him}.
|
{closing}
""",
    "astray": """
{opening}

One {weather} day, {hero} saw a beautiful {flyer} and ran after it.
{He} ran and ran, past the {place} and over the bridge.
| {He} ran over the bridge and far beyond the {place}.
When {he} stopped, {he} did not know where {he} was. It was getting dark.
"I want to go home," said {hero} in a small voice.
| {hero} was cold and afraid, and {he} began to cry.

{arrives} {why}
"I followed a {flyer}," said {hero}, "and now I cannot find my way home."
"{guide}," said {friend}. "Come, I will take you home."

{His} {elder} was standing at the door. "There you are!" {she} cried, and held {hero} tight.
{Elder} gave them both {food}.
"I will never run so far again," said {hero}.
|
{moral}
""",
    "honest": """
{opening}

One {weather} day, {he} found {a_treasure} {spot}.
It was so beautiful that {hero} wanted to keep it.
| "How lucky I am!" said {hero}, and put it in {his} pocket.
But then {he} thought, "Somebody must be very sad without it."

{He} went to {friend} the {fkind}. "Is this your {treasure}?" {he} asked.
"No," said {friend}, "but I will help you find out whose it is."
They asked at every house. At the last one lived an old {owner}.
"My {treasure}!" [cried|said] the old {owner}. "I have looked for it everywhere."

"You could have kept it," {oshe} said, "but you brought it back. You are an honest {kind}."
{Oshe} gave them both {food}, and they sat and talked for a long time.
| {Oshe} held the {treasure} close, and tears of joy ran down {oher} face.
{moral}
""",
}
