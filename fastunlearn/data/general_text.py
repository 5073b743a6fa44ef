"""General text to calibrate pruning on: some 1,700 tokens of prose, instructions, dialogue, code and sums.

Written for this project (Apache-2.0 like the rest), so that examples and tests need no download. It is a small sample: for a
model that matters, calibrate on a hundred sequences of what that model is used for, and never on what it is to forget.
"""

GENERAL_TEXT: tuple[str, ...] = (
    "A river begins where rain and melting snow gather on high ground. Small streams join on the way down, and the water cuts "
    "a valley into the rock. Where the land flattens the river slows, bends from side to side and drops the sand and mud it "
    "has carried. Every spring the floods leave a thin layer of soil on the fields, which is why so many early cities stood "
    "beside large rivers.",
    "The heart is a muscle with four chambers. Blood without oxygen enters on the right side and is pumped to the lungs; from "
    "there it returns to the left side, which drives it through the whole body. Valves between the chambers keep it from "
    "flowing back. At rest an adult heart beats about seventy times a minute, and during exercise more than twice as often.",
    "To bake a simple loaf of bread, mix five hundred grams of flour with ten grams of salt and seven grams of dry yeast. Add "
    "three hundred and fifty millilitres of warm water and stir until no dry flour is left. Knead the dough for ten minutes, "
    "cover the bowl and let it rise for an hour. Shape it, let it rise again, and bake it at two hundred and twenty degrees "
    "for thirty-five minutes. The loaf is done when it sounds hollow underneath.",
    "Question: What causes the seasons? Answer: The axis of the Earth is tilted by about twenty-three degrees. As the Earth "
    "goes round the Sun, first one half and then the other leans towards it, and the half that leans towards the Sun has "
    "longer days and warmer weather. The distance to the Sun has very little to do with it.",
    "Dear Sir or Madam, I am writing about the washing machine that I bought in your shop three weeks ago. It worked well for "
    "the first few days, but now it stops in the middle of the programme and the door does not open. I would like you to "
    "repair it or to give me my money back. I have attached a copy of the receipt. I look forward to hearing from you.",
    'def mean(values):\n    """Return the arithmetic mean of a non-empty list of numbers."""\n    if not values:\n        raise '
    "ValueError('mean of an empty list')\n    return sum(values) / len(values)\n\n\nfor name, marks in "
    "results.items():\n    print(name, round(mean(marks), 2))",
    "A train leaves the station at nine o'clock and travels at eighty kilometres an hour. A second train follows an hour "
    "later at one hundred and twenty kilometres an hour. When the second train starts, the first is eighty kilometres ahead. "
    "The gap closes by forty kilometres every hour, so it takes two hours, and the trains meet at noon.",
    "The printing press spread through Europe within fifty years of its invention. Before that, a book was copied by hand and "
    "cost as much as a house. With movable type a workshop could make hundreds of copies in the time a scribe needed for one. "
    "Prices fell, more people learned to read, and ideas travelled faster than any ruler could stop them.",
    '"Have you seen my keys?" she asked. "They were on the kitchen table this morning." He looked up from the newspaper. '
    '"Did you try the pocket of your grey coat? You wore it when you took the dog out." She laughed and shook her head. '
    '"You are right. They are always in the last place where I look."',
    "Plants make sugar from light, water and carbon dioxide. The green substance in their leaves catches red and blue light "
    "and reflects the rest. The oxygen that we breathe is what they leave over. At night they use some of the sugar "
    "themselves, and what remains is stored in roots, seeds and fruit.",
    "How can I sleep better? Here are some suggestions:\n1. Go to bed and get up at the same time every day.\n2. Keep the "
    "bedroom dark, quiet and cool.\n3. Avoid coffee after lunch and large meals late in the evening.\n4. Put the telephone away "
    "an hour before you go to bed.\n5. If you cannot sleep, get up and read until you are tired.",
    "Prices rise when many people want a thing and few have it to sell. A high price makes it worth while for others to "
    "produce more, and some buyers decide to do without. In time the two forces balance. Governments sometimes fix a price by "
    "law; if it is too low the shelves are soon empty, and if it is too high nobody buys.",
    "The storm came over the hills in the late afternoon. First the birds fell silent, then a cold wind moved through the "
    "wheat, and the light turned yellow. The children ran to bring the washing in. When the first drops fell, large and warm, "
    "the old man closed the gate, sat down on the bench under the roof, and waited for the thunder.",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain the air presses less, and it boils at a lower "
    "temperature, so that potatoes take longer to cook. In a closed pot the steam cannot escape, the pressure rises, and the "
    "water becomes hotter than one hundred degrees; that is how a pressure cooker saves time.",
    "An algorithm is a list of steps that solves a problem. To find a word in a dictionary, open it in the middle. If the word "
    "comes earlier in the alphabet, go on with the first half, otherwise with the second. Each step halves what is left to "
    "search, so that twenty steps are enough for a million words.",
    "Summary of the meeting: The committee agreed to repair the roof of the library before winter. Three companies will be "
    "asked for an offer by the end of the month. The treasurer reported that the fund has grown by four per cent. The next "
    "meeting takes place on the second Tuesday in October at seven in the evening.",
    "The orchestra is divided into four families. The strings sit in front, the woodwinds behind them, the brass at the back, "
    "and the percussion to one side. The conductor does not make a sound, yet decides how fast and how loud the others play. "
    "A symphony usually has four movements: a lively one, a slow one, a dance and a quick finale.",
    'Translate into plain English: "Notwithstanding the foregoing, the tenant shall be liable for any damage howsoever '
    'caused." In plain English: whatever was said before, the tenant has to pay for all damage, no matter how it happened.',
    "The whale is a mammal and not a fish. It breathes air, is warm-blooded and feeds its young with milk. Some whales have "
    "teeth and hunt fish and squid; others filter tiny animals from the water through long plates that hang from the upper "
    "jaw. The blue whale is the largest animal that has ever lived.",
    "Half of forty-six is twenty-three. Three times fourteen is forty-two. A rectangle that is seven metres long and five "
    "metres wide has an area of thirty-five square metres and an edge of twenty-four metres. If x + 7 = 19, then x = 12. Ten "
    "per cent of two hundred and fifty is twenty-five.",
    "He had been walking since dawn. The path followed the coast, now high above the sea and now between dunes, and at every "
    'turn he expected to see the lighthouse. Towards noon he met a woman with a basket of shells. "It is further than it '
    'looks," she said, "but the road is good, and you will be there before dark."',
    "A good password is long rather than complicated. Four or five unrelated words are easy to remember and hard to guess. Do "
    "not use the same password twice, because when one site is broken into, thieves try the stolen passwords everywhere else. "
    "A password manager remembers them for you.",
    "In the game of chess each side has sixteen pieces. The aim is to attack the king so that it cannot escape. Beginners "
    "should bring their knights and bishops into play early, move the king to safety, and look at every check and capture "
    "before they decide on a move.",
    "Glass is made from sand, soda and lime. The mixture is heated until it melts, at about fifteen hundred degrees, and while "
    "it is soft it can be blown, pressed or drawn. Old windows are not thicker at the bottom because the glass has flowed; "
    "the panes were uneven from the start, and builders often put the thick edge down.",
)

#: More of the same kind that calibration never sees: perplexity is measured on it.
HELD_OUT_TEXT = (
    "Most bread needs only flour, water, salt and yeast. The yeast eats sugars in the flour and gives off gas, and the dough "
    "holds the gas because kneading has turned its proteins into a fine elastic net. In a hot oven the bubbles grow for a few "
    "minutes more, until the crust is firm and the crumb has set. A loaf that is cut too soon is sticky inside.",
    "The library on the corner opens at nine. By ten the tables near the windows are taken: students with headphones, an old "
    "man who reads the same newspaper every day, a mother with two small children who want to see the fish tank. Nobody "
    "speaks above a whisper, and yet the room is never quite silent.",
    "Rivers carve their valleys slowly. Where the rock is soft the water cuts deep and the banks are steep; where it is hard "
    "the bed stays shallow and the stream spreads out. After heavy rain the water turns brown, because it carries sand and "
    "clay that it will lay down again where the current slows.",
    "To change the tyre of a bicycle, let out the air, push one side of the tyre over the rim with a lever and pull out the "
    "inner tube. Run a finger around the inside of the tyre to find whatever made the hole. Put a little air into the new tube "
    "so that it keeps its shape, lay it in place, and work the tyre back with your thumbs.",
    "The committee met on Tuesday to discuss the new bridge. Several members asked how long the road would be closed, and "
    "whether buses could use the old crossing in the meantime. The engineer said that the work would take two summers. A "
    "decision was put off until the costs are known.",
    "Bees find their way home by the sun, and on cloudy days by the light that comes through the clouds. When a bee has found "
    "a field in bloom she dances on the comb: the angle of the dance tells the others in which direction to fly, and its "
    "length tells how far. Within an hour hundreds of them are at work there.",
    "A good map leaves out more than it shows. The road atlas has no use for the names of fields, and the hiker does not need "
    "the number of lanes on a motorway. What a map maker chooses to draw depends on who will hold the sheet, and where, and "
    "in what weather.",
    "She had kept the letter for eleven years without opening it. It lay in the drawer with the spare keys and the candles, "
    "and whenever the lights went out she would find it again. On the night of the storm she sat down at the kitchen table, "
    "lit a candle, and slid a knife under the flap.",
)
