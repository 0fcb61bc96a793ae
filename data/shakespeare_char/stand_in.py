"""
A stand-in for tinyshakespeare, for machines that can't download it: generated, play-like English verse.

Notable features:
- the same 65 characters and the same layout (a name and a colon, lines, an empty line) as tinyshakespeare
- a grammar with agreement, several hundred words, scenes with their own cast and topics, and rhymed couplets, so a
  small model can learn at every distance: letters, words, syntax, speakers and topics
- the same on every machine and Python version: integer arithmetic only, no `random`

It is not Shakespeare, and losses on it can't be compared with losses on tinyshakespeare.
"""

import re

CHARACTERS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
LENGTH = 1_150_000  # characters; the last scene exceeds it slightly
SEED = 1623  # the year of the First Folio

MEN = 'Aldric Bastian Corwin Dunstan Everard Fenwick Godric Hartwin Ivo Jocelin Kester Lambert Merrick Norbert Oswin'
MEN += ' Piers Quillon Rufus Silvan Tobias Ulric Valence Wystan Yorick Zoran'
WOMEN = 'Annis Beatrix Clemence Dorothea Elspeth Felicia Gwendolen Hester Isolde Judith Katrin Lettice Maud Nerissa'
WOMEN += ' Odette Petra Quenna Rosamund Sabine Thea Ursula Venetia Winifred Xanthe Yolande Zilla'
RANKS = 'First Second Third'
COMMONERS = 'Sailor Shepherd Miller Watchman Gardener Servant Soldier Fishwife Ferryman Weaver Beggar Pedlar'
PLACES = 'Arden Brackwater Corvanne Dunmere Estermark Farrow Galloway Harrowgate Ilmar Jessamy Kelder Lorne Marrowby'
PLACES += ' Northmoor Ostrava Penhallow Quarrel Ravensea Saltmarsh Thornbury Umber Vell Westerly Xeres York Zell'

# Kinds of words, separated by spaces; kinds with phrases are separated by '|'. Earlier words are drawn more often.
WORDS = {
    'role': """king lord lady soldier queen friend brother captain duke prince sister father mother daughter son servant
        shepherd stranger widow beggar judge merchant priest cousin sailor fool poet thief messenger nurse master
        mistress neighbour traveller gardener physician tailor piper weaver miller ferryman jester knight squire hermit
        watchman pilgrim steward herald cobbler""",
    'thing': """crown sword letter ring house door gate ship candle cup road bell cloak book key bed table lantern purse
        tower wall bridge garden banner drum chain shield window river field sail mirror ladder rope orchard harbour
        mill barn market chapel forest island mountain meadow kitchen chamber coin grave pillow saddle cradle needle
        basket hammer anchor trumpet scroll feather goblet oar hearth cellar""",
    'wild': """moon star wind storm sea night horse hound wolf rose morning winter summer raven lamb owl fox swan
        sparrow thorn oak willow apple evening midnight tempest cloud shadow flame falcon nightingale lion eagle serpent
        bee stag lark toad lily violet""",
    'body': 'heart hand eye tongue face voice foot brow knee shoulder cheek finger',
    'mass': """love honour grief hope fear truth mercy sorrow fortune patience wisdom silence anger duty envy justice
        courage pride sleep shame gold blood bread wine salt honey death peace war time music thunder sunlight ivy
        silver kindness treason laughter jealousy beauty""",
    'matter': """promise secret dream oath quarrel debt bargain errand rumour curse blessing victory riddle wedding
        journey fault lesson prayer jest wound name story kingdom tale song battle feast""",
    'adj': """good sweet old poor great true cold dear gentle proud noble young foul brave false dark little strange
        honest bitter weary silent golden bright wicked humble idle merry pale wild faithful quiet heavy empty broken
        hungry loyal cruel patient crooked tender hollow ancient bold royal jealous wise foolish blind deaf restless
        barren ragged stubborn lazy drowsy mortal precious rotten swift sullen thirsty vexed wandering frozen exiled
        quick zealous quaint joyful ill-met moon-struck sea-worn half-forgotten""",
    'state': """weary glad content afraid alone ready sick merry lost patient angry ashamed hungry cold faithful proud
        silent undone jealous sorry asleep awake wise blind""",
    'adv': """well|still|too well|now|ever|gently|softly|bravely|boldly|swiftly|truly|slowly|sweetly|in vain|humbly
        |gladly|quietly|bitterly|nobly|once again|by night|at last|in haste|from afar|alone|together|without rest
        |for ever|ere the dawn|o'er the hills|like <a> <n>|like <ns>""",
    'tv': """love know keep seek follow fear praise serve find hold bring take carry break hear trust forgive wake
        remember betray curse bless guard watch bury steal mend answer teach ask need hide send honour mock pity punish
        obey doubt envy flatter crown banish conquer comfort cherish defend despise kiss lead leave lose marry miss
        question quit sell buy shun strike wound welcome wrong deceive deny spare prize""",
    'iv': """come go weep sleep speak wait sing laugh rise fall stay return tremble dream pray fight die live work march
        sail wander listen kneel dance sigh whisper burn bleed fade rest ride yield hope vanish despair""",
    'oath': """by heaven|by my sword|upon my life|in truth|I swear|by this hand|marry|faith|on my honour|by the moon
        |I pray thee|as I live""",
    'cry': 'O|alas|ah|fie|hark|peace|lo|away|come|nay|why|soft|enough|ay me|ho',
    'link': 'and|but|yet|for|then|so|think it not strange:|mark me:|and therefore|now',
    'urge': 'and|then|now|but|pray,|so',
    'him_you': """my lord|sir|good sir|my friend|cousin|brother|captain|old man|my liege|gentle sir|thou fool
        |<adj> sir|<listener>|good <listener>""",
    'her_you': """madam|my lady|good lady|sweet lady|sister|cousin|dear madam|gentle lady|mistress|my queen
        |<adj> lady|<listener>|sweet <listener>""",
    'time': """to-night|to-morrow|this hour|at dawn|before the sun is up|when the bell is heard|within three days
        |ere long|this very day|at the turn of the tide|when the moon is down|ere <the> <iv.s>""",
    'place': """in <town>|at the gate|in the garden|by the river|on the road to <town>|beneath the tower|upon the wall
        |in my father's house|beside the old mill|at the door of the chapel|in the dark of the forest|near <town>
        |in the <n>'s shadow|before <the>""",
    'the': """the <n>|the <adj> <n>|my <n>|the <n>|the <adj> <n>|thy <n>|<name>|<mass>|our <n>|the <n> of <town>
        |my <adj> <n>|this <n>|that <adj> <n>|<a> <adj> <n>|my <adj> <role>|<name>'s <n>""",
}

IRREGULAR = """know knew known|keep kept kept|seek sought sought|find found found|hold held held|bring brought brought
    |take took taken|break broke broken|hear heard heard|forgive forgave forgiven|wake woke woken|steal stole stolen
    |teach taught taught|hide hid hidden|send sent sent|lead led led|leave left left|lose lost lost|quit quit quit
    |sell sold sold|buy bought bought|shun shunned shunned|strike struck struck|come came come|go went gone
    |weep wept wept|sleep slept slept|speak spoke spoken|sing sang sung|rise rose risen|fall fell fallen
    |fight fought fought|kneel knelt knelt|bleed bled bled|ride rode ridden|burn burnt burnt"""
PARTS = {verb: parts for verb, *parts in (forms.split() for forms in IRREGULAR.split('|'))}
PLURALS = {'thief': 'thieves', 'wolf': 'wolves', 'foot': 'feet', 'ferryman': 'ferrymen', 'watchman': 'watchmen'}
SHE = ['lady', 'queen', 'sister', 'mother', 'daughter', 'widow', 'nurse', 'mistress']

# Each sentence is a template whose <slots> are filled from left to right: <n> any noun, <ns> its plural, <the> a noun
# phrase (singular), <it> the pronoun of the last noun, <who> one of the cast, then <he> <him> <his>, <you> how the
# listener is addressed, <tv> and <iv> verbs with and without object: .s third person, .h thou, .d past, .n participle.
STATEMENTS = [
    'I <tv> <the>, and yet I <tv> <the>',
    'I <tv> <the> as <the> <tv.s> <the>',
    'I have <tv.n> <the> <place>',
    'I will <tv> <the> <time>, and <iv> no more',
    'I am <state>, <you>, and my <n> is <state>',
    'I was <state> when <the> <iv.d>; now I am <state>',
    'I never <tv.d> <the>, nor will I <tv> <the>',
    'I saw <the> <iv> <place>, and <the> <iv> <adv>',
    'my <n> <tv.s> <the>, and my <body> <iv.s> <adv>',
    'thou <tv.h> <the>, but <the> <tv.s> thee not',
    'thou hast <tv.n> <the>; I have <tv.n> nothing but <mass>',
    'thou art <a> <adj> <role>, and thy <n> is <adj>',
    'thou art as <adj> as <the> that <iv.s> <place>',
    'we <tv> <the> <adv>, and <the> <tv.s> us',
    'we are but <ns> that <iv> <place>',
    'you <tv> <the>, and call it <mass>',
    'you have <tv.n> my <n>, <you>, and I shall <tv> yours',
    'they say that <the> <iv.s> <place>',
    'they that <tv> <ns> shall <iv> <adv>',
    '<the> <tv.s> <the>; <the> <iv.s> <adv>',
    '<the> that <tv.d> <the> is <state>, and <iv.s> no more',
    '<the> hath <tv.n> my <n>, and my <n> is <tv.n>',
    '<the> shall <tv> <the> ere <the> can <iv>',
    '<the> is <adj>, but <mass> is more <adj> still',
    'the <adj> <ns> of <town> <iv> <adv>, and no <role> <tv.s> them',
    '<ns> and <ns> <iv> <place>, where once <the> <iv.d>',
    'there is no <n> in <town> so <adj> as <the>',
    'there was <a> <adj> <role>, who <tv.d> <a> <n> and <iv.d> <adv>',
    '<who> is <state>: <he> <tv.s> <the>, and <the> <tv.s> <him>',
    '<who> <tv.d> <his> <n> <place>, and <he> <iv.d> <adv>',
    '<who> hath <tv.n> <the>; I saw <him> <iv> <place>',
    '<who> will <iv> <time>, and <his> <n> with <him>',
    'I spoke with <who> <place>; <he> <tv.s> <the>',
    'the <n> of <who> is <tv.n>, and <he> <iv.s> <adv>',
    'if <the> <iv.s>, then <the> must <iv> too',
    'if thou <tv.h> <the>, thou shalt <tv> <the> <time>',
    'if I <iv> <place>, let <the> <tv> my <n>',
    'when <the> <iv.s>, <ns> <iv>; when <the> <iv.s>, they <iv> no more',
    'when I <tv.d> <the>, I <tv.d> <the> likewise',
    'though <the> <iv.s> <adv>, my <body> is <state>',
    'so <adj> <a> <n> was never <tv.n> by <ns>',
    'as <the> <tv.s> <the>, so <iv.s> the <adj> <n>',
    'not <the> nor <the> shall <tv> me from <mass>',
    'he that <tv.s> <ns> <tv.s> <mass>, and he that <tv.s> <mass> <iv.s> <adv>',
    'better <a> <adj> <n> than <a> <adj> <n>',
    '<mass> is <a> <n>, and <mass> <a> <adj> <n>',
    '<mass> without <mass> is but <a> <adj> <n>',
    'some <tv> <mass>, and some <tv> <ns>; I <tv> <the>',
    'three <ns> I had, and three <ns> have <tv.n> me',
    'the news is <adj>: <the> hath <tv.n> <the> <place>',
    'would that <the> were <state>, and I <a> <n> <place>',
    'my <role> was <a> <role> in <town>, and <tv.d> <ns> there',
    "this <n> is mine; that <n> is <who>'s, and <he> <tv.s> it well",
    "'tis <mass> that <tv.s> <the>, and <mass> that <tv.s> <it>",
    "I'll <tv> <the> no more; I'll <tv> <the>, and <iv>",
    "there's <mass> in <the> -- nay, there's <mass>",
]
QUESTIONS = [
    'what <n> is this, that <tv.s> <the>',
    'who <tv.d> <the> <place>',
    'why <iv.h> thou, <you>, and <tv.h> <the>',
    'why dost thou <tv> <the>, and <iv> <adv>',
    'where is <who>, that <tv.d> <the>',
    'where <iv.s> <the>, and who <tv.s> <it>',
    'hast thou <tv.n> <the>, or <tv.n> <the>',
    'wilt thou <tv> <the> <time>',
    'shall I <tv> <the>, or shall <the> <tv> me',
    'shall we <iv> <place>, <you>',
    'is <the> <state>, or <tv.n> <adv>',
    'doth <who> <tv> <the>, or <iv> <place>',
    'how shall <the> <iv>, if <the> <tv.s> us not',
    'how now, <you>, what <n> hast thou <tv.n>',
    'can <mass> <tv> <the>, or <a> <n> <tv> <mass>',
    'didst thou not <tv> <the> <place>',
    'what would you <tv>, <you>: <the> or <the>',
    'art thou <a> <role>, or <a> <adj> <n>',
    "is't <the> that <iv.s> so <adv>",
]
COMMANDS = [
    '<tv> <the>, <you>, and <tv> <the> <time>',
    '<tv> not <the>; <tv> thy <n> instead',
    '<iv>, <you>, and let <the> <iv>',
    'go to <town>, and <tv> <the> that <iv.s> there',
    'come, <iv> with me <place>',
    'bring me <the>, and <tv> <the> <adv>',
    'let <the> <tv> <the>, and <the> be <tv.n>',
    'let us <iv> <adv>, ere <the> <iv.s>',
    'give <who> thy <n>, and bid <him> <iv> <time>',
    'tell <who> that <the> <iv.s> <place>',
    'speak not of <the>, nor of <the>',
    'beware <the>, that <tv.s> <ns>',
    'bear this <n> to <who>, and <tv> <him> well',
    'farewell, <you>; <tv> <the>, and remember me',
]
CRIES = [
    'O <adj> <n>, O <adj> <n>',
    'O <n>, that <tv.s> <the> and <tv.s> <the>',
    'what <a> <adj> <n> is <the>',
    'how <adj> is <the>, how <adj> my <n>',
    'heaven <tv> <the>, and <tv> us all',
    'long live <the>, and <who>, and <town>',
    '<a> <n>, <a> <n>, my <n> for <a> <adj> <n>',
    'up, <ns> of <town>; <the> is <tv.n>',
]
ANSWERS = [
    'ay, <you>; <who> <tv.s> <the>',
    'no, <you>: I <tv.d> <the> <place>',
    'I know not, <you>, but <the> <iv.s> <adv>',
    'ask <who>; <he> <tv.d> it <place>',
    'the same, <you>, that <tv.d> <the>',
    'the <echo>, <you>? I never <tv.d> the <echo>',
    'what of the <echo>? <the> <tv.s> it',
    'that <adj> <echo>, <you>, and <a> <adj> <n>',
    'speak no more of the <echo>; <tv> <the>',
    'it is <the>, and no other',
]
GREETINGS = [
    'good morrow, <you>; how <iv.s> <the>?',
    'who comes there? stand, and <tv> thy <n>.',
    'well met, <you>. what news from <town>?',
    'hail, <you>, and hail, <who>!',
    'here comes <who>, with <a> <n> in <his> hand.',
]
# A bill read aloud: the only source of the digit and the two signs, which are as rare in tinyshakespeare.
BILLS = [
    'item: 3 <ns> & 33 <ns>, at 3 $ the dozen',
    'it is written here: 3 $ for <a> <n>, & no <mass>',
    '33 <ns>, 3 <ns> & <a> <n>: the sum is 333 $',
]
# Rows of nouns that rhyme; the two lines of a couplet end in two nouns of a row.
RHYMES = [
    'night light knight flight fight sight might',
    'day way bay clay play prey fray',
    'heart part dart art cart',
    'stone throne bone crone drone',
    'king ring spring thing wing string',
    'sea tree key knee plea bee',
    'fire choir lyre spire squire briar',
    'land hand sand band strand brand',
    'tear year fear spear seer deer',
    'foe woe snow bow crow',
    'gold fold hold cold mould',
    'dream stream gleam beam team',
    'grave wave slave cave knave',
    'moon tune spoon noon boon',
    'head bed bread thread',
    'door shore floor oar boar',
    'bell well cell shell spell dell',
]
COUPLETS = [
    'so let <the> <iv> beneath the <rhyme>',
    'and <the> must <iv> before the <rhyme>',
    'for <mass> was ever <a> <adj> <rhyme>',
    'no <role> shall <tv> the <adj> <rhyme>',
    'and I, that <tv.d> <a> <n>, now <tv> the <rhyme>',
    'thus <mass> <tv.s> <mass> and the <rhyme>',
    'the <n> is <tv.n>, and so is the <rhyme>',
    'I leave my <n> to <who>, and the <rhyme>',
    'let <ns> <iv>, and let us <tv> the <rhyme>',
    'where <ns> <iv>, there <iv.s> the <adj> <rhyme>',
]

VOWELS = re.compile('[aeiouy]+')
SLOT = re.compile(r'<(\w+)(?:\.(\w))?>')
ARTICLE = re.compile(r'\ba (?=[aeiouAEIOU]|honest|honour|hour)')
SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))'?[a-z]")
LINE_START = re.compile(r"^(?:'|-- )?[a-z]")


def plural(noun):
    """'wolf' -> 'wolves'."""
    if noun.endswith('y') and noun[-2] not in 'aeiou':
        return noun[:-1] + 'ies'
    return PLURALS.get(noun) or noun + ('es' if noun.endswith(('s', 'x', 'ch', 'sh')) else 's')


def with_ending(verb, ending):
    """A verb with an ending that starts with a vowel: love + est -> lovest, quit + est -> quittest."""
    if verb.endswith('e'):
        return verb[:-1] + ending
    return verb + (verb[-1] if verb in ('quit', 'shun') else '') + ending


def inflect(verb, form):
    """One form of a verb: None base, 's' third person, 'h' thou, 'd' past, 'n' past participle."""
    if form in ('d', 'n') and verb in PARTS:
        return PARTS[verb][form == 'n']
    consonant_y = verb.endswith('y') and verb[-2] not in 'aeiou'
    root = verb[:-1] + 'i' if consonant_y else verb
    if form == 's':
        return root + ('es' if consonant_y or verb.endswith(('ss', 'sh', 'ch', 'o')) else 's')
    if form is None:
        return verb
    return with_ending(root, 'est' if form == 'h' else 'ed')


def syllables(word):
    """The approximate number of syllables, accurate enough to break lines near ten."""
    letters = re.sub('[^a-z]', '', word.lower())
    silent = len(letters) > 2 and letters.endswith('e') and not letters.endswith('le')
    return max(1, len(VOWELS.findall(letters)) - silent)


def listed(text):
    """The words of a kind as a list, or its phrases if they are separated by '|'."""
    return [' '.join(item.split()) for item in text.split('|')] if '|' in text else text.split()


class Playwright:
    """Writes the play. Random numbers come from a 64-bit linear congruential generator (Knuth's MMIX constants)."""

    def __init__(self, seed):
        self.state = seed
        self.words = {kind: listed(text) for kind, text in WORDS.items()}
        self.nouns = [self.words[kind] for kind in ('role', 'thing', 'thing', 'wild', 'matter', 'body')]
        self.places = PLACES.split()
        self.people = [(name, 'he') for name in MEN.split()] + [(name, 'she') for name in WOMEN.split()]
        self.asked = False
        self.echo = 'crown'
        self.fixed = {
            'a': lambda: 'a',
            'n': self.noun,
            'ns': lambda: plural(self.noun()),
            'name': lambda: self.pick(self.people)[0],
            'town': lambda: self.home if self.chance(50) else self.pick(self.places),
            'who': self.person,
            'he': lambda: self.pronoun,
            'him': lambda: 'him' if self.pronoun == 'he' else 'her',
            'his': lambda: 'his' if self.pronoun == 'he' else 'her',
            'it': lambda: 'her' if self.last_noun in SHE else 'him' if self.last_noun in self.words['role'] else 'it',
            'echo': lambda: self.echo,
            'listener': lambda: self.listener.title() if self.listener.isupper() else 'friend',
            'you': lambda: self.fill(self.favour(self.words['him_you' if self.listens == 'he' else 'her_you'])),
            'rhyme': lambda: self.rhymes.pop(),
        }

    def below(self, n):
        """A random integer in [0, n)."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 32) * n >> 32

    def chance(self, percent):
        return self.below(100) < percent

    def pick(self, items):
        return items[self.below(len(items))]

    def favour(self, items):
        """A random item; earlier ones are more likely, since word frequencies in real text are skewed."""
        return items[min(self.below(len(items)), self.below(len(items)))]

    def noun(self):
        noun = self.pick(self.topics) if self.chance(30) else self.favour(self.pick(self.nouns))
        self.last_noun = noun
        return noun

    def person(self):
        """The name of another person, usually in this scene; sets the pronoun for 'he' or 'she'."""
        name, self.pronoun = self.pick(self.cast if self.chance(75) else self.people)
        return self.person() if name.upper() == self.speaker else name

    def slot(self, match):
        kind, form = match.groups()
        if kind in ('tv', 'iv'):
            return inflect(self.favour(self.words[kind]), form)
        if kind in self.fixed:
            return self.fixed[kind]()
        return self.fill(self.favour(self.words[kind]))

    def fill(self, template):
        return SLOT.sub(self.slot, template)

    def sentence(self, kind):
        """One sentence of a kind (a list of templates) with its end mark; the first letter is lower case."""
        text = self.fill(self.pick(kind))
        if kind is STATEMENTS or kind is COMMANDS:
            opening = self.below(100)
            if opening < 8:
                text = f'{self.pick(self.words["oath"])}, {text}'
            elif opening < 14:
                text = f'{self.pick(self.words["cry"])}, {text}'
            elif opening < 32:
                text = f'{self.pick(self.words["link" if kind is STATEMENTS else "urge"])} {text}'
        if kind is GREETINGS:
            return text
        mark = '?' if kind is QUESTIONS else '!' if kind is CRIES or self.chance(6) else '.'
        self.asked = kind is QUESTIONS
        return text + mark

    def couplet(self):
        """Two lines that rhyme."""
        row = self.pick(RHYMES).split()
        first = self.below(len(row))
        second = (first + 1 + self.below(len(row) - 1)) % len(row)
        self.rhymes = [row[second], row[first]]
        return [self.fill(self.pick(COUPLETS)) + mark for mark in (',', '.')]

    def speech(self, opening):
        """The sentences of one speech."""
        length = self.pick([1, 1, 1, 2, 2, 2, 3, 3, 4, 5, 7])
        kinds = [self.pick([STATEMENTS] * 9 + [QUESTIONS] * 3 + [COMMANDS] * 3 + [CRIES]) for _ in range(length)]
        if opening:
            kinds[0] = GREETINGS
        elif self.asked and self.chance(70):
            kinds[0] = ANSWERS
        if self.chance(1) and self.chance(60):
            kinds.append(BILLS)
        return [self.sentence(kind) for kind in kinds]

    def verse(self, sentences):
        """Lines of about ten syllables, capitalized; they tend to end with a phrase."""
        lines, line, beats = [], [], 0
        for word in polish(' '.join(sentences)).split(' '):
            if beats and (beats + syllables(word) > 10 or beats > 7 and line[-1][-1] in '.,;:?!'):
                lines.append(' '.join(line))
                line, beats = [], 0
            line.append(word)
            beats += syllables(word)
        return [capital(text) for text in [*lines, ' '.join(line)]]

    def prose(self, sentences):
        """Lines of up to 60 characters, for commoners."""
        lines = ['']
        for word in polish(' '.join(sentences)).split(' '):
            if len(lines[-1]) + len(word) >= 60:
                lines.append('')
            lines[-1] += (' ' if lines[-1] else '') + word
        return lines

    def scene(self):
        """One scene: cast, place and topics, then speeches, mostly in turn, and a couplet at the end."""
        self.home = self.pick(self.places)
        self.topics = [self.favour(self.pick(self.nouns)) for _ in range(5)]
        self.cast = []
        while len(self.cast) < 2 or self.chance(50) and len(self.cast) < 5:
            person = self.pick(self.people)
            if person not in self.cast:
                self.cast.append(person)
        speakers = [(name.upper(), pronoun, False) for name, pronoun in self.cast]
        if self.chance(40):
            commoner = self.pick(COMMONERS.split())
            woman = 'she' if commoner == 'Fishwife' else 'he'
            speakers += [(f'{rank} {commoner}', woman, True) for rank in RANKS.split()[: 1 + self.below(3)]]
        if self.chance(10):
            speakers.append(('All', 'he', True))
        now, before = self.below(len(speakers)), 0
        speeches = []
        for turn in range(8 + self.below(18)):
            other = (now + 1 + self.below(len(speakers) - 1)) % len(speakers)
            if turn and self.chance(60):
                other = before
            self.speaker, _, common = speakers[now]
            self.listener, self.listens, _ = speakers[other]
            sentences = self.speech(opening=turn == 0)
            speeches.append((self.speaker, self.prose(sentences) if common else self.verse(sentences)))
            self.echo = self.last_noun
            now, before = other, now
        speeches[-1][1].extend(capital(polish(line)) for line in self.couplet())
        return ''.join(f'{name}:\n' + '\n'.join(lines) + '\n\n' for name, lines in speeches)


def capital(line):
    """A line with its first letter capitalized."""
    return LINE_START.sub(lambda match: match[0].upper(), line)


def polish(text):
    """Text with 'a owl' -> 'an owl', and the first letter of each sentence capitalized."""
    return SENTENCE_START.sub(lambda match: match[0].upper(), ARTICLE.sub('an ', text))


def generate():
    """The whole corpus: a str of slightly more than LENGTH characters, the same on every machine."""
    playwright = Playwright(SEED)
    scenes, length = [], 0
    while length < LENGTH:
        scenes.append(playwright.scene())
        length += len(scenes[-1])
    return ''.join(scenes).rstrip('\n') + '\n'
