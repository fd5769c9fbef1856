"""Units of measurement as they stand behind numbers, in English and Chinese."""

import re
from fractions import Fraction
from typing import NamedTuple


class Unit(NamedTuple):
    """multiplier: of the number itself, 10000 for 万; scale: this unit in the first one of its dimension.

    dimensions: ((name, power), ...), sorted. A word that is in no table is a dimension of its own.
    """

    multiplier: Fraction = Fraction(1)
    scale: Fraction = Fraction(1)
    dimensions: tuple = ()


NO_UNIT = Unit()
PERCENT = (("percent", 1),)
CURRENCIES = {"$": "dollar", "¥": "yuan", "€": "euro", "£": "sterling"}

_TABLE = """
length 1 m meter metre 米
length 1/1000 mm millimeter millimetre 毫米
length 1/100 cm centimeter centimetre 厘米 公分
length 1/10 dm decimeter decimetre 分米
length 1000 km kilometer kilometre 千米 公里
length 127/5000 in inch 英寸
length 381/1250 ft foot feet 英尺
length 1143/1250 yd yard 码
length 1609344/1000 mi mile 英里
length^2 10000 ha hectare 公顷
length^3 1/1000 L l liter litre 升
length^3 1/1000000 mL ml milliliter millilitre 毫升
mass 1 kg kilogram 千克 公斤
mass 1/1000000 mg milligram 毫克
mass 1/1000 g gram 克
mass 1000 t ton tonne 吨
mass 1/2 斤
mass 45359237/100000000 lb lbs pound 磅
mass 45359237/1600000000 oz ounce 盎司
time 1 s sec second 秒 秒钟
time 60 min minute 分钟
time 3600 h hr hour 小时
time 86400 day 天 日
time 604800 week 周 星期
month 1 month 月 个月
month 12 yr year 年
length*time^-1 1609344/3600000 mph
length*time^-1 1000/3600 kmh kph
angle 1 ° degree deg 度
radian 1 rad radian 弧度
celsius 1 °C celsius 摄氏度
fahrenheit 1 °F fahrenheit 华氏度
usd 1 dollar usd 美元
usd 1/100 cent 美分
cny 1 yuan rmb 元 元钱 块钱 圆 人民币
cny 1/10 角
eur 1 euro 欧元
gbp 1 sterling 英镑
jpy 1 yen 日元
force 1 N newton 牛 牛顿
energy 1 J joule 焦 焦耳
power 1 W watt 瓦 瓦特
voltage 1 V volt 伏 伏特
current 1 A ampere 安 安培
percent 1/100 % percent pct
percent 1/1000 ‰
"""
# Words that count and measure nothing: 3个 is 3.
_COUNTERS = ("个 只 条 件 张 支 枝 棵 朵 块 片 双 对 把 台 辆 架 艘 间 座 层 位 名 人 种 组 颗 粒 份 杯 瓶 盒 箱 "
             "袋 包 根 匹 群 枚 幅 套 页 题 道 倍 岁 头 本 户 首 班 排 桶 篮 串 盘 unit piece").split()
_MULTIPLIERS = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
                "百": 100, "千": 1000, "万": 10**4, "十万": 10**5, "百万": 10**6, "千万": 10**7, "亿": 10**8}
# Behind a number these say more than its unit: "14 or so", "14 tenths", 14左右.
_NO_UNITS = set("and or not nor but plus minus times over out more less than about only because since for with mod "
                "sqrt sin cos tan log exp each wrong except either both nan inf infinity the squared cubed factorial "
                "root power half halve third quarter fourth fifth sixth seventh eighth ninth tenth eleventh "
                "twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth "
                "hundredth thousandth millionth".split())
_NO_UNIT_CHARACTERS = re.compile("[或和与及至到不非没未多余几约半又点成折之上下内外是为的左右错对一二三四五六七八九十]")
_POWERS = {"square": 2, "sq": 2, "平方": 2, "cubic": 3, "cu": 3, "立方": 3, "squared": 2, "cubed": 3}


def _read_table():
    units = {}
    for line in _TABLE.strip().splitlines():
        dimension, scale, *names = line.split()
        powers = (part.partition("^") for part in dimension.split("*"))
        dimensions = tuple((name, int(power or 1)) for name, _, power in powers)
        units |= dict.fromkeys(names, Unit(scale=Fraction(scale), dimensions=dimensions))
    units |= dict.fromkeys(_COUNTERS, NO_UNIT)
    return units | {name: Unit(multiplier=Fraction(value)) for name, value in _MULTIPLIERS.items()}


UNITS = _read_table()
_CHINESE = "|".join(sorted((name for name in UNITS if name > "\u4e00"), key=len, reverse=True))
_FACTOR = re.compile(r"\s*(?:\\cdot|\*)?\s*(?P<per>/|per(?![a-z])|每)?\s*"
                     r"(?:(?P<before>平方|立方|(?:square|sq|cubic|cu)(?![a-z]))\.?)?\s*"
                     rf"(?P<word>°[CF]?|%|‰|[A-Za-z]+|{_CHINESE}|[\u4e00-\u9fff]+)\.?\s*"
                     r"(?:\^\{?(?P<power>-?\d)\}?|(?P<after>squared|cubed)(?![a-z]))?\s*")


def read_unit(text, any_words=True, after_counters=False):
    """The Unit that text spells, or None.

    any_words: a word in no table is a unit as well, and so is a letter behind a space. after_counters: such a word has
    to stand behind a counter (三个苹果, but not 三角形).
    """
    multiplier, scale, dimensions, has_counter, position = Fraction(1), Fraction(1), {}, False, 0
    while position < len(text):
        factor = _FACTOR.match(text, position)
        if factor is None:
            return None
        position, word = factor.end(), factor["word"]
        unit = next((UNITS[name] for name in (word, word.lower(), _singular(word.lower())) if name in UNITS), None)
        if word.isascii() and word.isalpha() and len(word) == 1:
            before = text[: factor.start("word")][-1:]
            if unit is None or not (factor["per"] or (any_words and before == " ")):
                return None
        elif unit is None:
            if not any_words or (after_counters and not has_counter) or (word.isascii() and len(word) == 2):
                return None
            if _NO_UNITS & {word.lower(), _singular(word.lower())} or _NO_UNIT_CHARACTERS.search(word):
                return None
            unit = Unit(dimensions=((_singular(word.casefold()), 1),))
        has_counter = has_counter or unit == NO_UNIT
        power = int(factor["power"] or 1) * _POWERS.get(factor["before"], 1) * _POWERS.get(factor["after"], 1)
        power = -power if factor["per"] else power
        multiplier *= unit.multiplier
        scale *= unit.scale**power
        for name, count in unit.dimensions:
            dimensions[name] = dimensions.get(name, 0) + count * power
    return Unit(multiplier, scale, tuple(sorted((name, count) for name, count in dimensions.items() if count)))


def _singular(word):
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word
