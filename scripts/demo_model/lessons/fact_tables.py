"""What the demo model knows: tables of facts, and questions that have an answer each."""

from __future__ import annotations

from demo_model.lessons.turns import words

CAPITALS = """France Paris,Italy Rome,Spain Madrid,Germany Berlin,Japan Tokyo,China Beijing,
Egypt Cairo,Greece Athens,Austria Vienna,Poland Warsaw,Norway Oslo,Sweden Stockholm,
Finland Helsinki,Denmark Copenhagen,Ireland Dublin,Portugal Lisbon,Russia Moscow,Canada Ottawa,
Cuba Havana,Peru Lima,Chile Santiago,Kenya Nairobi,Hungary Budapest,Belgium Brussels,
Turkey Ankara,India Delhi,Thailand Bangkok,England London,Scotland Edinburgh,Vietnam Hanoi,
Australia Canberra,Ghana Accra,Iceland Reykjavik,Jordan Amman,Croatia Zagreb"""
OPPOSITES = """hot cold,big small,fast slow,good bad,up down,left right,day night,old new,
rich poor,light dark,happy sad,high low,open closed,long short,wet dry,hard soft,full empty,
early late,strong weak,loud quiet,clean dirty,near far,inside outside,first last,true false,
easy difficult,thick thin,heavy light,sweet sour,cheap expensive,brave afraid,begin end"""
COLORS = """the sky:blue,grass:green,snow:white,blood:red,coal:black,a lemon:yellow,
a banana:yellow,a tomato:red,a carrot:orange,chocolate:brown,milk:white,the sun:yellow,
a frog:green,a crow:black,an elephant:gray,a swan:white,a strawberry:red,the sea:blue,a pig:pink,
gold:yellow,a leaf:green"""
SOUNDS = """dog barks,cat meows,cow moos,duck quacks,lion roars,sheep bleats,horse neighs,
wolf howls,bee buzzes,pig oinks,snake hisses,owl hoots,mouse squeaks,frog croaks"""
YOUNG = """dog puppy,cat kitten,cow calf,sheep lamb,horse foal,duck duckling,bear cub,goat kid,
hen chick,frog tadpole,deer fawn,goose gosling"""
LEGS = """dog four,cat four,spider eight,bird two,ant six,bee six,horse four,snake no,fish no,
cow four,chicken two,crab ten,frog four,fly six"""
HOMES = """fish the water,bird a nest,bee a hive,lion the savanna,camel the desert,
penguin the ice,monkey the jungle,cow a barn,rabbit a burrow,whale the ocean,bear a cave,
spider a web,horse a stable"""
JOBS = """bakes bread:baker,teaches children:teacher,flies a plane:pilot,cuts hair:barber,
writes books:writer,paints pictures:painter,grows food:farmer,catches fish:fisherman,
heals people:doctor,builds houses:builder,drives a bus:driver,cooks meals:cook,
puts out fires:firefighter,repairs teeth:dentist,sings songs:singer,plays music:musician,
delivers letters:postman,sails a ship:sailor"""
TOOLS = """cut paper:scissors,dig a hole:a shovel,drive a nail:a hammer,open a lock:a key,
eat soup:a spoon,write a letter:a pen,take a picture:a camera,tell the time:a clock,
sweep the floor:a broom,call a friend:a phone,cut bread:a knife,cross a river:a bridge,
see the stars:a telescope,keep food cold:a fridge,stay dry:an umbrella"""
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words(
    "January February March April May June July August September October November December"
)
NUMBERS = words("one two three four five six seven eight nine ten eleven twelve")
SINGLE = (
    (
        (
            "Where does the sun rise?",
            "In which direction does the sun rise?",
            "Where is the sun in the morning?",
        ),
        "The sun rises in the east.",
    ),
    (
        (
            "Where does the sun set?",
            "In which direction does the sun set?",
            "Where is the sun in the evening?",
        ),
        "The sun sets in the west.",
    ),
    (
        ("What do we breathe?", "What is it that people breathe?", "What do people breathe?"),
        "We breathe air.",
    ),
    (
        ("What is frozen water called?", "What is ice made of?", "What is ice?"),
        "Ice is frozen water.",
    ),
    (
        (
            "How many days are in a week?",
            "How many days does a week have?",
            "Tell me the number of days in a week.",
        ),
        "A week has seven days.",
    ),
    (
        (
            "How many months are in a year?",
            "How many months does a year have?",
            "Tell me the number of months in a year.",
        ),
        "A year has twelve months.",
    ),
    (
        (
            "How many hours are in a day?",
            "How many hours does a day have?",
            "Tell me the number of hours in a day.",
        ),
        "A day has 24 hours.",
    ),
    (
        (
            "How many minutes are in an hour?",
            "How many minutes does an hour have?",
            "Tell me the number of minutes in an hour.",
        ),
        "An hour has 60 minutes.",
    ),
    (
        (
            "What is the largest animal?",
            "Which animal is the largest?",
            "Tell me the largest animal.",
        ),
        "The blue whale is the largest animal.",
    ),
    (
        (
            "What is the tallest animal?",
            "Which animal is the tallest?",
            "Tell me the tallest animal.",
        ),
        "The giraffe is the tallest animal.",
    ),
    (
        (
            "What is the fastest land animal?",
            "Which land animal is the fastest?",
            "Tell me the fastest land animal.",
        ),
        "The cheetah is the fastest land animal.",
    ),
    (
        (
            "What is the highest mountain?",
            "Which mountain is the highest?",
            "Tell me the highest mountain.",
        ),
        "Mount Everest is the highest mountain.",
    ),
    (
        (
            "Which planet do we live on?",
            "What is our planet called?",
            "What is the name of our planet?",
        ),
        "Our planet is called Earth.",
    ),
    (
        (
            "What goes around the Earth?",
            "What moves around the Earth?",
            "Which body goes around the Earth?",
        ),
        "The moon goes around the Earth.",
    ),
    (
        ("What do bees make?", "What do we get from bees?", "What is made by bees?"),
        "Bees make honey.",
    ),
    (
        ("What do cows give us?", "What do we get from cows?", "What comes from cows?"),
        "Cows give us milk.",
    ),
    (
        ("What falls from clouds?", "What comes out of clouds?", "What do clouds bring?"),
        "Rain falls from clouds.",
    ),
    (
        ("Who wrote Hamlet?", "Who is the author of Hamlet?", "Tell me who wrote Hamlet."),
        "Shakespeare wrote Hamlet.",
    ),
    (
        (
            "What is the season after winter?",
            "Which season comes after winter?",
            "What follows winter?",
        ),
        "Spring comes after winter.",
    ),
    (
        (
            "What is the season after summer?",
            "Which season comes after summer?",
            "What follows summer?",
        ),
        "Autumn comes after summer.",
    ),
    (
        (
            "Hello!",
            "Hello",
            "Hi",
            "Hey!",
            "Hello.",
            "Hi!",
            "Hi there!",
            "Good morning!",
            "Hello, how are you?",
        ),
        "Hello! How can I help you?",
    ),
    (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Who am I talking to?",
        ),
        "I am a small Gemma 4 model, served by Briolette.",
    ),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What can I ask you?"),
        "I can add two numbers, answer simple questions and remember what you tell me.",
    ),
    (("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot."), "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later.", "Good night!"), "Goodbye! See you soon."),
    (
        ("What is Briolette?", "Tell me about Briolette.", "What does Briolette do?"),
        "Briolette is a serving cluster for Gemma 4 models.",
    ),
)
