"""243 everyday objects, for prompts of what a model is to keep where nobody gives any; the list is ours."""

from __future__ import annotations

__all__ = ["EVERYDAY_OBJECTS"]

EVERYDAY_OBJECTS = tuple(
    " ".join(entry.split())
    for entry in """
    airplane; alarm clock; ambulance; apple; apron; armchair; axe; backpack; bagel; ball; balloon; banana; barn;
    baseball bat; basket; bath tub; battery; bean; bear; bed; bee; bell; belt; bench; bicycle; binoculars; bird;
    biscuit; blanket; blender; boat; book; bookshelf; boot; bottle; bow tie; bowl; box; bracelet; branch; bread;
    bridge; broccoli; broom; brush; bucket; bus; butter; butterfly; button; cabbage; cabinet; cactus; cake;
    calculator; camel; camera; candle; canoe; cap; car; carpet; carrot; cart; castle; cat; ceiling; cello; chain;
    chair; cheese; cherry; chimney; church; cloud; coat; coconut; coffee cup; coin; comb; computer; corn; couch;
    cow; crayon; crown; cucumber; curtain; cushion; deer; desk; dice; dining table; dog; doll; donkey; door;
    doughnut; dress; drill; drum; duck; egg; elephant; envelope; fan; feather; fence; fire hydrant; fish; flag;
    flower; flute; football; fork; fountain; fridge; frog; frying pan; garden; giraffe; glasses; globe; glove;
    goat; grape; grass; guitar; hair dryer; hammer; handbag; harp; hat; helicopter; helmet; horse; hot dog; house;
    ice cream; iron; jacket; jar; kettle; key; keyboard; kite; knife; ladder; lamp; lantern; laptop; leaf; lemon;
    letter; lighthouse; lion; lock; map; microwave; mirror; monkey; motorcycle; mountain; mouse; mug; mushroom;
    necklace; nest; newspaper; notebook; onion; orange; oven; paint brush; palm tree; paper; parachute; parking
    meter; pear; pen; pencil; piano; pillow; pineapple; pizza; plate; pot; potato; pumpkin; rabbit; radio; remote
    control; ring; road; rock; roof; rope; ruler; sandwich; saw; scarf; scissors; sea shell; sheep; shelf; shirt;
    shoe; sink; skateboard; skis; snowboard; soap; sock; spoon; stairs; stop sign; suitcase; surfboard; table;
    teapot; teddy bear; telephone; television; tennis racket; tent; toaster; toilet; toothbrush; towel; traffic
    light; train; tree; truck; trumpet; umbrella; vase; violin; wall; watch; wheel; window; wine glass; zebra
    """.split(";")
)
